"""A worker of ``hybridkex tunnel --workers``: a program that the command starts."""

import socket
import sys
from functools import partial

from hybridkex.apps.tunnel.worker import read_orders, run_worker
from hybridkex.cli.logs import set_up_logging
from hybridkex.cli.running import run_trio
from hybridkex.net.descriptors import raise_soft_limit


def main() -> int:
    """Serve as the control socket says, whose descriptor is the argument."""
    control = socket.socket(fileno=int(sys.argv[1]))
    try:
        orders = read_orders(control)
    except EOFError:
        return 1
    settings = orders.recipe()
    set_up_logging(settings.log_level)
    raise_soft_limit()
    run_trio(partial(run_worker, control, orders, settings))
    return 0
