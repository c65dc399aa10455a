"""The networks of the architectures bench: other people's, with random weights, built offline.

`make coverage` sets up the environment that they are imported from. Sizes are the smallest that
leave a family's construction as it is; what a network is made of is looked at, not what it knows.
"""

from __future__ import annotations

from bench.networks import audio, images, language, maps, pictures, timms
from bench.networks.network import Network

NETWORKS: dict[str, Network] = {
    name: network
    for module in (images, timms, maps, pictures, language, audio)
    for name, network in module.NETWORKS.items()
}


def get(name: str) -> Network:
    """Return a network by its name."""
    return NETWORKS[name]
