"""`make gpu`: what a CUDA device can check and time of this release."""
