"""Options that many commands share."""

from __future__ import annotations

import click

from nfm.stages.places import LOCAL_PATH

config_option = click.option(
    "-c", "--config", "config_path", required=True, type=LOCAL_PATH, metavar="F", help="The run's TOML file."
)
set_option = click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override a field.")
json_option = click.option("--json", "as_json", is_flag=True, help="For machines.")
