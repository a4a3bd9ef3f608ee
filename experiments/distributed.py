"""Joins the processes of a run, one or more per host, before any device is touched."""

import argparse
import os
import pathlib
import re
import socket
import sys
from collections.abc import Mapping

import jax

from experiments import cli

_MODES = ("auto", "on", "off")
# What JAX finds a cluster by, and what tells that this process is one of several.
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


def add_flags(parser: argparse.ArgumentParser) -> None:
  group = parser.add_argument_group("many hosts (docs/pods.md)")
  group.add_argument("--distributed", choices=_MODES, default="auto", help="join other processes")
  group.add_argument("--coordinator", help="HOST:PORT of process 0, where nothing else tells")
  group.add_argument("--num_processes", type=int, help="with --coordinator: of the whole run")
  group.add_argument("--process_id", type=int, help="with --coordinator: 0, 1, ...")
  group.add_argument("--join_seconds", type=int, default=120, help="how long to wait for others")


def join(args: argparse.Namespace) -> None:
  """Calls jax.distributed.initialize if this process is one of several; says so before it waits.

  When hosts are missing, JAX ends the process with an abort that no Python code can catch: what
  is awaited, and the command to run, has to be on the screen before.

  Raises:
    ValueError: flags that do not go together.
  """
  given = [args.coordinator, args.num_processes, args.process_id]
  if any(x is not None for x in given) and (None in given or args.distributed == "off"):
    raise ValueError(
      f"--coordinator={args.coordinator} --num_processes={args.num_processes} "
      f"--process_id={args.process_id} --distributed={args.distributed}: must come together, all "
      "three and not with off"
    )
  if args.coordinator is not None:
    _check(args)
  elif args.distributed == "off" or (args.distributed == "auto" and not is_one_of_many(os.environ)):
    return
  address = args.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "the cluster's address")
  count = args.num_processes or next((os.environ[x] for x in _COUNTS if x in os.environ), "all")
  print(
    f"{socket.gethostname()}: waiting up to {args.join_seconds} s for {count} processes at "
    f"{address}. Does every host run this command? On a Cloud TPU pod: gcloud compute tpus tpu-vm "
    f'ssh NAME --worker=all --command="{" ".join(("python -m experiments.train", *sys.argv[1:]))}"',
    file=sys.stderr,
    flush=True,
  )
  options = dict(initialization_timeout=args.join_seconds)
  if args.coordinator is not None:
    options |= dict(
      coordinator_address=args.coordinator,
      num_processes=args.num_processes,
      process_id=args.process_id,
      # JAX would listen on every address of the host.
      coordinator_bind_address=args.coordinator,
    )
  try:
    jax.distributed.initialize(**options)
  except (ValueError, RuntimeError) as error:
    cli.fail(f"--distributed={args.distributed}: {str(error).splitlines()[0]}")
  print(
    f"process {jax.process_index()} of {jax.process_count()}: {jax.local_device_count()} of "
    f"{jax.device_count()} devices",
    file=sys.stderr,
    flush=True,
  )


def is_one_of_many(environment: Mapping[str, str]) -> bool:
  """Whether the environment, or the machine, is that of a cluster which JAX can join by itself."""
  counts = (environment.get(name, "1") for name in _COUNTS)
  if any(count.isdecimal() and int(count) > 1 for count in counts):
    return True
  if "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "JAX_COORDINATOR_ADDRESS" in environment:
    return True
  # GKE, and several TPU slices.
  if "JOBSET_NAME" in environment or "MEGASCALE_NUM_SLICES" in environment:
    return True
  # A Cloud TPU VM tells its hosts by its metadata server; a slice of one host joins itself.
  return "TPU_SKIP_MDS_QUERY" not in environment and _has_tpu()


def _has_tpu() -> bool:
  vendors = pathlib.Path("/sys/bus/pci/devices").glob("*/vendor")
  return any(path.read_text().strip() == "0x1ae0" for path in vendors)  # Google


def _check(args: argparse.Namespace) -> None:
  if not re.fullmatch(r"\S+:\d+", args.coordinator):
    raise ValueError(f"--coordinator={args.coordinator}: must be HOST:PORT")
  if args.num_processes < 1 or not 0 <= args.process_id < args.num_processes:
    raise ValueError(
      f"--process_id={args.process_id} --num_processes={args.num_processes}: must be a number >= 1 "
      "and one below it"
    )
