"""The fault matrix: every fault at every moment in every exchange, what the client must see, and the proof.

``cells.py`` says which cells there are and why the others cannot be, ``expectation.py`` what the client must
see in each; both are pure. ``test_matrix.py`` runs all of them against the real proxy, ``python -m
tests.matrix`` prints the summary that ``docs/failover.md`` shows.
"""
