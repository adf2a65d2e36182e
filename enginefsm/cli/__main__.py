"""Run the command line as `python -m enginefsm.cli`."""

import sys

from enginefsm.cli.main import main

sys.exit(main())
