"""Several processes behind one port: a parent that supervises, workers that serve and know of each other."""
