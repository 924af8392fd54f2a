"""The tests; a package, because one of the peers (flow_matching) installs a top-level package of that name."""
