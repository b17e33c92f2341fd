"""What needs a CUDA device, marked `gpu`; the same checks run on the CPU against itself, which finds slips."""
