"""Train the bundled demo checkpoint from scratch, export it, and measure it.

See scripts/demo_training and `--help`.
"""

import os

# These must be set before torch starts its threads. With them idle threads sleep, which makes a
# training step several times faster while the machine has other work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "100")

from demo_training.command import main
from minivlm.app.cli import run

if __name__ == "__main__":
    run(main)
