"""Who waits: the line of requests before the fleet, priorities, limits."""
