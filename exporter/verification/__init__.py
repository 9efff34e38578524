"""Compare exported graphs with torch, and emulate reduced precision on a CPU."""
