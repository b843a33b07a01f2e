"""Small random-weight models of five architectures and a literal float64 reference."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for capture_toy, which the kill test also runs as a script
