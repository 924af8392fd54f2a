"""Options that many commands share."""

from __future__ import annotations

import math
from typing import Any

import click

from nfm.stages.places import LOCAL_PATH


class FiniteRange(click.FloatRange):
    """As click's, which takes nan for every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value} is no finite number", param, ctx)
        return found


config_option = click.option(
    "-c", "--config", "config_path", required=True, type=LOCAL_PATH, metavar="F", help="The run's TOML file."
)
set_option = click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a field.")
json_option = click.option("--json", "as_json", is_flag=True, help="For machines.")
