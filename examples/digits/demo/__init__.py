"""`make demo`: a coordinator and three sites as separate processes on this machine learn the digits."""
