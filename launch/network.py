"""Environment variables for NCCL and gloo, by kind of network. Each has its reason; a profile's ``environment.variables`` win."""

from __future__ import annotations

from launch.config import ClusterConfig

Variables = dict[str, str]

# NCCL keeps its last collectives in memory and writes them down on a time-out: torchfrtrace then tells which rank missed which collective.
FLIGHT_RECORDER: Variables = {
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",  # the name before torch 2.8
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
}

FLIGHT_RECORDER_FILES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")  # the new name and the old one

NETWORKS: dict[str, Variables] = {
    "infiniband": {
        "NCCL_IB_HCA": "mlx5",  # data goes over the InfiniBand adapters, not over an Ethernet port that also speaks RDMA
        "NCCL_IB_TIMEOUT": "22",  # 2^22 x 4 us = 17 s: a re-routing fabric must not kill a long run
        "NCCL_IB_RETRY_CNT": "10",
    },
    "efa": {
        "FI_PROVIDER": "efa",
        "FI_EFA_USE_DEVICE_RDMA": "1",  # GPU memory is sent without a copy to the host
        "FI_EFA_FORK_SAFE": "1",  # data workers fork
    },
    "ethernet": {
        "NCCL_IB_DISABLE": "1",  # do not spend half a minute looking for InfiniBand
        "NCCL_SOCKET_NTHREADS": "4",  # one TCP stream does not fill a fast link
        "NCCL_NSOCKS_PERTHREAD": "4",
    },
    "local": {"GLOO_SOCKET_IFNAME": "lo"},  # all nodes are this machine
}


def variables(cluster: ClusterConfig) -> Variables:
    """What the job exports for its network: profile, interface, and the flight recorder on GPUs."""
    found = dict(NETWORKS[cluster.network])
    if cluster.interface:
        found |= {"NCCL_SOCKET_IFNAME": cluster.interface, "GLOO_SOCKET_IFNAME": cluster.interface}
    elif cluster.gpus_per_node:
        found["NCCL_SOCKET_IFNAME"] = "^lo,docker0"  # NCCL otherwise picks the container bridge on some hosts and hangs
    if cluster.gpus_per_node:
        found |= FLIGHT_RECORDER
    return found
