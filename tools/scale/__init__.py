"""Compute what training costs at other sizes: FLOPs, memory, communication, time and money."""
