"""``python -m llmjepa_kernels``, for ``torchrun -m llmjepa_kernels train``."""

import sys

from llmjepa_kernels.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
