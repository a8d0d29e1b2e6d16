"""The chaos soak: ``make soak``. Real processes, a storm of faults drawn from a seed, and nothing may break.

``schedule`` says what befalls whom and when, ``storm`` does it and writes it into the ``ledger``, ``clients``
(a process of their own) ask all the while and write down each ``outcome``; ``judge`` compares the two.
"""
