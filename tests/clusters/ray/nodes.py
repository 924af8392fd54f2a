"""A Ray cluster of several nodes on this machine, in a process of its own: `python nodes.py HEAD_CPUS TEMP [--jobs]`.

Says a line of JSON with its addresses, then obeys lines on stdin, answering `done` to each: `add NAME CPUS [FOLDER]`,
whose processes work in that folder and keep their scratch there, and `remove NAME`, which kills every process of that
node. Ends, and the cluster with it, when stdin does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from ray._private.utils import write_ray_address
from ray.cluster_utils import Cluster

STORE_BYTES = 80 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cpus", type=int)
    parser.add_argument("temp")
    parser.add_argument("--jobs", action="store_true", help="with the job server")
    options = parser.parse_args()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": options.cpus,
            "include_dashboard": options.jobs,
            "dashboard_port": 0,
            "dashboard_agent_listen_port": 0,  # the default one may be taken by another cluster of this machine
            "temp_dir": options.temp,
            "object_store_memory": STORE_BYTES,
            "_system_config": {"worker_niceness": 0},  # else they starve on a busy machine
        },
    )
    # The job server looks here for its own cluster, and else takes any of this machine.
    write_ray_address(cluster.address, options.temp)
    print(json.dumps({"address": cluster.address, "jobs": f"http://{cluster.webui_url}"}), flush=True)
    nodes = {}
    for line in sys.stdin:
        verb, name, *facts = line.split()
        if verb == "add":
            for folder in facts[1:]:
                os.chdir(folder)
                os.environ |= {"NFM_SCRATCH": f"{folder}/scratch", "NFM_CACHE": f"{folder}/cache"}
            nodes[name] = cluster.add_node(num_cpus=int(facts[0]), object_store_memory=STORE_BYTES)
        else:
            cluster.remove_node(nodes.pop(name), allow_graceful=False)
        print("done", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
