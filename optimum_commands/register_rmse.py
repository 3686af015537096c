"""`optimum-cli export rmse`: the flags and the code of `rmse-export`.

Optimum imports every file of the namespace folder `optimum/commands/register`, where a wheel puts this one, each time that
`optimum-cli` starts.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from rmse_edge.cli.export import DESCRIPTION, add_flags, export_parsed


class RMSEExportCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="rmse", help=DESCRIPTION)

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        add_flags(parser)

    def run(self) -> None:
        sys.exit(export_parsed("optimum-cli export rmse", self.args))


REGISTER_COMMANDS = [(RMSEExportCommand, ExportCommand)]
