"""What should be in whose memory: another runner for a hot model, and what was pinned.

``plan.py`` and ``pins.py`` decide, purely; ``snapshot.py`` reads the fleet for them; ``keeper.py`` acts.
"""
