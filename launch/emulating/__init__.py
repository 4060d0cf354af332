"""Hosts that are network namespaces of this machine, with shaped links between them: what launch.netlab is made of."""
