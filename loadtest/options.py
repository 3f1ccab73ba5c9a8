"""Command line options beside Locust's own; each is an environment variable too."""

from __future__ import annotations

from argparse import ArgumentParser


def add_options(parser: ArgumentParser) -> None:
    """Add them."""
    parser.add_argument(
        "--loop",
        choices=["open", "closed"],
        default="open",
        env_var="LOCUST_LOOP",
        help="open: every user is one arrival a second, whether or not the server keeps up, and "
        "latency counts from the moment at which a request was to be sent. closed: every user "
        "waits for an answer, then thinks. Default: open.",
    )
    parser.add_argument(
        "--arrivals",
        choices=["poisson", "constant"],
        default="poisson",
        env_var="LOCUST_ARRIVALS",
        help="Of an open loop. Default: poisson.",
    )
    parser.add_argument(
        "--max-open",
        type=int,
        default=1_000,
        env_var="LOCUST_MAX_OPEN",
        help="Most unanswered requests of a process of an open loop; an arrival over it is not "
        "sent and counts as failed. Default: 1000.",
    )
    parser.add_argument(
        "--think-s",
        type=float,
        default=1.0,
        env_var="LOCUST_THINK_S",
        help="Mean time between an answer and the next request in a closed loop. Default: 1.",
    )
    parser.add_argument(
        "--max-p99-ms",
        type=float,
        default=1_000.0,
        env_var="LOCUST_MAX_P99_MS",
        help="A larger 99th percentile fails the run. Default: 1000.",
    )
    parser.add_argument(
        "--max-error-percent",
        type=float,
        default=1.0,
        env_var="LOCUST_MAX_ERROR_PERCENT",
        help="A larger share of requests without a right answer, refused ones included, fails the "
        "run. Default: 1.",
    )
    parser.add_argument(
        "--items-file",
        env_var="LOCUST_ITEMS_FILE",
        help="Item ids, one a line, the most popular first. Default: those the server recommends "
        "to somebody it knows nothing about.",
    )
    parser.add_argument(
        "--constraint-sets",
        env_var="LOCUST_CONSTRAINT_SETS",
        help="Sets that some requests ask within, separated by commas. Default: those of the "
        "catalog served; none with --swap-every-s, since another release may not have them.",
    )
    parser.add_argument(
        "--timeout-ms",
        type=int,
        env_var="LOCUST_TIMEOUT_MS",
        help="timeout_ms of every request. Default: the server's.",
    )
    parser.add_argument(
        "--traffic-seed", type=int, default=0, env_var="LOCUST_TRAFFIC_SEED", help="Of all draws."
    )
    parser.add_argument(
        "--api-key",
        env_var="LOCUST_API_KEY",
        is_secret=True,
        help="Sent as Authorization: Bearer with every request that is not for /admin.",
    )
    parser.add_argument(
        "--swap-every-s",
        type=float,
        default=0.0,
        env_var="LOCUST_SWAP_EVERY_S",
        help="Activate another release of the store as often, and at the end the first one again; "
        "0 does not. Needs --admin-key and two releases.",
    )
    parser.add_argument(
        "--admin-key", env_var="LOCUST_ADMIN_KEY", is_secret=True, help="Key of /admin."
    )
    parser.add_argument(
        "--step-users",
        type=int,
        default=10,
        env_var="LOCUST_STEP_USERS",
        help="Of steps.py: users of the first step. Default: 10.",
    )
    parser.add_argument(
        "--step-factor",
        type=float,
        default=1.5,
        env_var="LOCUST_STEP_FACTOR",
        help="Of steps.py: users of a step, divided by those of the step before. Default: 1.5.",
    )
    parser.add_argument(
        "--step-s",
        type=float,
        default=30.0,
        env_var="LOCUST_STEP_S",
        help="Of steps.py: seconds of a step; the first quarter is not counted. Default: 30.",
    )
    parser.add_argument(
        "--max-steps",
        type=int,
        default=12,
        env_var="LOCUST_MAX_STEPS",
        help="Of steps.py: most steps; it ends before at the first that breaks a threshold. "
        "Default: 12.",
    )
