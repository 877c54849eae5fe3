"""The public test kit: what tests of isopod, and of programs built on it, are made of.

- `wait_for_condition_with_backoff`: waits for what is to become true, never for a fixed time.
- `TestCluster`, `TestNode`: real nodes on loopback, in one process.
- `History`, `check_linearizable`: were the answers those of one copy? Specifications are in `isopod.testing.specifications`.
- `run_plan`, `make_plan`, `shrink`: whole clusters in the simulation, from a seed; on the command line `isopod sim`.
"""

from isopod.testing.cluster import TestCluster, TestNode
from isopod.testing.history import UNKNOWN, History, Operation
from isopod.testing.linearize import Finding, Verdict, check_linearizable
from isopod.testing.outcome import Outcome
from isopod.testing.plan import Plan, Step, decode_plan, encode_plan
from isopod.testing.scenarios import SCENARIOS, Scenario, make_plan, scenario
from isopod.testing.shrink import Shrunk, shrink
from isopod.testing.simulation import run_plan
from isopod.testing.waiting import ConditionNotMet, timeout_multiplier, wait_for_condition_with_backoff

__all__ = [
    "SCENARIOS",
    "UNKNOWN",
    "ConditionNotMet",
    "Finding",
    "History",
    "Operation",
    "Outcome",
    "Plan",
    "Scenario",
    "Shrunk",
    "Step",
    "TestCluster",
    "TestNode",
    "Verdict",
    "check_linearizable",
    "decode_plan",
    "encode_plan",
    "make_plan",
    "run_plan",
    "scenario",
    "shrink",
    "timeout_multiplier",
    "wait_for_condition_with_backoff",
]
