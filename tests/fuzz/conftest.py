"""Machines that tests share are at times slow: what takes long here is not a fault."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("fuzz", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fuzz")
