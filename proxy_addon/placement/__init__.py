"""Which node serves a request: pure functions on plain data, no clock, no socket."""
