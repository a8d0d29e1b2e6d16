"""The commands of ``sollol`` that belong to the proxy, one file each."""
