"""The command; see :mod:`interop.soak`."""

import argparse
import json
from functools import partial

import trio

from interop.soak import crowd, hostile, load, loops


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m interop.soak")
    commands = parser.add_subparsers(dest="load", required=True)
    idle = commands.add_parser("idle", help="many connections that do nothing")
    idle.add_argument("--connections", type=int, default=10_000)
    storm = commands.add_parser("storm", help="connect, transfer, close")
    storm.add_argument("--seconds", type=float, default=600)
    slow = commands.add_parser("slowloris", help="handshakes a byte at a time")
    slow.add_argument("--connections", type=int, default=1000)
    slow.add_argument("--deadline", type=float, default=10)
    updates = commands.add_parser("updates", help="key updates without end")
    updates.add_argument("--count", type=int, default=1000)
    strangers = commands.add_parser("hostile", help="hostile peers at every port of every command")
    strangers.add_argument("--service", action="append", help="this one; may be repeated")
    strangers.add_argument("--seed", type=int, default=1)
    strangers.add_argument("--rounds", type=int, default=50, help="visits of each kind (50)")
    crowds = commands.add_parser("crowd", help="thousands of connections, and the delay of others")
    crowds.add_argument("--service", action="append", help="this one; may be repeated")
    crowds.add_argument("--kind", action="append", choices=crowd.CROWDS, help="may be repeated")
    crowds.add_argument("--connections", type=int, default=2500)
    crowds.add_argument("--addresses", type=int, default=1, help="from which they come (1)")
    crowds.add_argument("--own", action="store_true", help="from the address of the good client")
    turns = commands.add_parser("loops", help="the same at a server of asyncio's and of uvloop's")
    turns.add_argument("--kind", action="append", choices=crowd.CROWDS, help="may be repeated")
    turns.add_argument("--connections", type=int, default=2500)
    options = vars(parser.parse_args())
    if options["load"] == "hostile":
        for kind in hostile.services(options["service"]):
            hostile.attack(kind, seed=options["seed"], rounds=options["rounds"])
        return
    if options["load"] == "crowd":
        for door in crowd.DOORS:
            for said in options["kind"] or crowd.CROWDS:
                if door.name in (options["service"] or [door.name]):
                    print(
                        crowd.crowd(
                            *(door, said, options["connections"]),
                            addresses=options["addresses"],
                            own=options["own"],
                        )
                    )
        return
    if options["load"] == "loops":
        load.raise_file_limit()
        for loop in loops.LOOPS:
            for said in options["kind"] or ("whole", "reset", "silent"):
                print(loops.measure(loop, said, options["connections"]))
        return
    run = getattr(load, options.pop("load"))
    load.raise_file_limit()
    print(json.dumps(trio.run(partial(run, **options)), indent=2))


if __name__ == "__main__":
    main()
