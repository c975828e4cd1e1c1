"""``python -m hybridkex`` is the ``hybridkex`` command."""

import sys

from hybridkex.cli import main

sys.exit(main())
