"""Serving under load: requests per second and latency of 1, 4 and 16 clients, beside one client alone.

``python -m benchmarks.load`` prints a table for a small and a large network and an untrained GHN of the published T
size on one thread. Each client asks again as soon as it has its weights. *other seeds*: every request differs, so all
are predicted; *cached*: all are equal, so one is; *TLS*: as the first, over TLS. The server is a process of its own,
the clients are threads of this one. Seconds are told for the first line of each network only; all other figures are
ratios to it, measured in the same run: requests per second to its own, latencies to its median.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import trustme

from benchmarks.processes import running, serve_hypernetwork
from benchmarks.serving import save_untrained
from ghn_client import GHNClient
from ghn_service.training.evaluation.report import markdown_table
from tests.data.regenerate import stored_model

NETWORKS = {"squeezenet1_1": "small, 5 MB", "resnet50": "large, 102 MB"}
CLIENTS = (1, 4, 16)
VARIANTS = ("other seeds", "cached", "TLS")
PERCENTILES = (50, 95, 99)
WARM_UP_CALLS = 3
MIN_CALLS = 30

Row = dict[str, Any]
"""Network, variant and number of clients; requests per second; latencies in seconds by percentile (``p50_s``, ...)."""


def measure_load(client: GHNClient, onnx_bytes: bytes, *, num_clients: int, seconds: float, equal: bool) -> Row:
    """Lets clients ask as fast as they can, for so long and so often at least."""
    seeds = itertools.repeat(0) if equal else itertools.count(int(time.monotonic() * 1e6))
    latencies: list[float] = []
    failures: list[Exception] = []

    def ask() -> None:
        start = time.perf_counter()
        client.predict(onnx_bytes, seed=next(seeds))
        latencies.append(time.perf_counter() - start)

    def ask_on() -> None:
        try:
            while not failures and (time.perf_counter() < end or len(latencies) < MIN_CALLS):
                ask()
        except Exception as error:
            failures.append(error)

    for _ in range(WARM_UP_CALLS):
        ask()
    latencies.clear()
    begin = time.perf_counter()
    end = begin + seconds
    threads = [threading.Thread(target=ask_on) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    passed = time.perf_counter() - begin
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    return {
        "clients": num_clients,
        "calls": len(latencies),
        "requests_per_s": len(latencies) / passed,
        **{f"p{share}_s": cuts[share - 1] for share in PERCENTILES},
    }


def measure_network(network: str, checkpoint: Path, folder: Path, seconds: float) -> list[Row]:
    """All rows of one network; the first is that of one client alone."""
    onnx_bytes = stored_model(network, "dynamo-train")
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    paths = {name: folder / f"{name}.pem" for name in ("authority", "certificate", "key")}
    authority.cert_pem.write_to_path(paths["authority"])
    certificate.private_key_and_cert_chain_pem.write_to_path(paths["certificate"])
    certificate.private_key_pem.write_to_path(paths["key"])
    rows = []
    for variant in VARIANTS:
        secure = {"tls_certificate": paths["certificate"], "tls_key": paths["key"]} if variant == "TLS" else {}
        trusted = paths["authority"] if variant == "TLS" else None
        cache = {} if variant == "cached" else {"cache_bytes": 0}
        settings = {**cache, **secure, "max_queue": 4 * max(CLIENTS), "max_peer_share": 1.0}
        with (
            running(serve_hypernetwork, checkpoint, settings) as (address, _),
            GHNClient(address, max_attempts=50, root_certificates=trusted) as client,
        ):
            for num_clients in CLIENTS:
                row = measure_load(
                    client, onnx_bytes, num_clients=num_clients, seconds=seconds, equal=variant == "cached"
                )
                rows.append({"network": network, "variant": variant, **row})
    return rows


def report(rows: Sequence[Row]) -> None:
    """Prints the table."""
    header = ["network", "requests", "clients", "requests/s", *(f"p{share}" for share in PERCENTILES)]
    cells = []
    for row in rows:
        alone = next(other for other in rows if other["network"] == row["network"])
        rate = f"{row['requests_per_s'] / alone['requests_per_s']:.2f}"
        shares = [f"{row[f'p{share}_s'] / alone['p50_s']:.2f}" for share in PERCENTILES]
        if row is alone:
            rate, shares[0] = f"1 ({row['requests_per_s']:.1f})", f"1 ({row['p50_s']:.3f} s)"
        cells.append([row["network"], row["variant"], str(row["clients"]), rate, *shares])
    print("\nServing under load, ratios to one client alone:\n")
    print("\n".join(markdown_table(header, cells)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), help="networks of tests/data")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds for each line of the table")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        checkpoint = save_untrained(name)
        rows = [
            row
            for network in options.networks
            for row in measure_network(network, checkpoint, Path(name), options.seconds)
        ]
    report(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
