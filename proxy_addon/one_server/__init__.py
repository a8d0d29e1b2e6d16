"""The endpoints that concern the whole fleet: answered from its state or fanned out."""
