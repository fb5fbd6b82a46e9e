"""A subcommand of fmnist on the embedded sample, with the arguments that all of them have."""

import argparse
from types import ModuleType


def run(module: ModuleType, *options: str, data: str = "sample", device: str = "cpu") -> None:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    parser.set_defaults(data=data, require_full_data=False, device=device)
    module.run(parser.parse_args(options))
