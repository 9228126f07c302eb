"""What differential privacy takes on either side: vectors of bounded norm on a grid, and noise on that grid."""
