"""`python -m lcmdistill`, which is also what `torchrun -m` and `accelerate launch -m` start."""

from lcmdistill.cli import main

main()
