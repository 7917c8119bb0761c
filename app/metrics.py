"""Every Prometheus metric of the service, in one place. Base units, bounded labels, the registry as argument.

Requests, images and executions are kept apart: a request carries one image or several, an execution is one run of one
stage on a batch.
"""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

# Geometric, a factor of 2 from 0.5 ms to 16 s: a quantile read off them is at most a factor of 2 wide.
DURATION_BUCKETS = tuple(0.0005 * 2**step for step in range(16))
SIZE_BUCKETS = tuple(float(2**step) for step in range(9))  # 1 .. 256 images
OUTCOMES = ("ok", "client_error", "overloaded", "timeout", "failed")  # every value that the label `outcome` takes
REASONS = ("head_timeout", "head_bytes", "malformed", "idle", "unread", "evicted", "refused")  # of a connection's end
PHASES = ("decode", "queue", "compute")


class Metrics:
    """The service's metrics, registered in the registry given."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "fovea_requests",
            "Requests answered, by outcome: ok, client_error, overloaded, timeout or failed.",
            ["model", "outcome"],
            registry=registry,
        )
        self.images = Counter(
            "fovea_images", "Images of answered requests, by their own outcome.", ["model", "outcome"], registry=registry
        )
        self.request_duration = Histogram(
            "fovea_request_duration_seconds",
            "Time from the arrival of a request's head to its answer, the upload of its body included.",
            ["model"],
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self.phase_duration = Histogram(
            "fovea_phase_duration_seconds",
            "Where an image's time goes: decode (with its wait, where threads do only that), queue (for a batch), "
            "compute (its batch's run).",
            ["model", "phase"],
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self.in_flight = Gauge("fovea_in_flight", "Images admitted and not yet answered.", registry=registry)
        self.in_flight_bytes = Gauge("fovea_in_flight_bytes", "Bytes of request bodies held in memory.", registry=registry)
        self.queue_size = Gauge(
            "fovea_queue_size", "Images waiting for a batch of this stage.", ["model", "stage"], registry=registry
        )
        self.batch_size = Histogram(
            "fovea_batch_size",
            "Images in one execution of this stage; its count is the number of executions.",
            ["model", "stage"],
            buckets=SIZE_BUCKETS,
            registry=registry,
        )
        self.stage_duration = Histogram(
            "fovea_stage_duration_seconds",
            "Time of one execution of this stage, whatever its batch size.",
            ["model", "stage"],
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self.stage_failures = Counter(
            "fovea_stage_failures", "Executions of this stage that failed.", ["model", "stage"], registry=registry
        )
        self.runs_given_up = Counter(
            "fovea_runs_given_up",
            "Executions that did not end; after eight the model is not ready any more.",
            ["model"],
            registry=registry,
        )
        self.exits = Counter("fovea_exits", "Images that left after this stage.", ["model", "stage"], registry=registry)
        self.answered = Counter(
            "fovea_answered",
            "Images answered, by the operating point they were answered at.",
            ["model", "quality"],
            registry=registry,
        )
        self.skipped = Counter(
            "fovea_skipped", "Images not computed because their caller had gone.", ["model", "stage"], registry=registry
        )
        self.expired = Counter(
            "fovea_expired",
            "Images not computed because this stage would have ended after their time budget.",
            ["model", "stage"],
            registry=registry,
        )
        self.wasted = Counter(
            "fovea_wasted",
            "Images computed by this stage whose caller left meanwhile.",
            ["model", "stage"],
            registry=registry,
        )
        self.wasted_s = Counter(
            "fovea_wasted_seconds",
            "Time that this stage's executions took for them, of what fovea_stage_duration_seconds has.",
            ["model", "stage"],
            registry=registry,
        )
        self.stage_cost = Gauge(
            "fovea_stage_cost_seconds",
            "What an execution of this stage takes, as fitted to the last ones: fixed, and per_image in addition for each.",
            ["model", "stage", "part"],
            registry=registry,
        )
        self.connections = Gauge("fovea_connections", "Connections open now.", registry=registry)
        self.connections_closed = Counter(
            "fovea_connections_closed",
            "Connections ended by the service: head_timeout, head_bytes, malformed, idle, unread, evicted or refused.",
            ["reason"],
            registry=registry,
        )
        for reason in REASONS:  # so that a rate sees the first one
            self.connections_closed.labels(reason)
        self.log_lines_dropped = Counter(
            "fovea_log_lines_dropped", "Lines of the log that could not be written, or not soon enough.", registry=registry
        )
        self.loop_lag = Gauge(
            "fovea_event_loop_lag_seconds",
            "How late the event loop was at worst in the last seconds: a request waits so long unseen.",
            registry=registry,
        )
        self.expected = Gauge(
            "fovea_expected_seconds",
            "When an image that came now would have its answer, with what is added for safety.",
            ["model"],
            registry=registry,
        )
        self.steps_down = Gauge(
            "fovea_quality_steps_down",
            "Operating points below the default that requests are taken down to now.",
            ["model"],
            registry=registry,
        )
        self.model = Info(
            "fovea_model", "What is really running.", ["model", "version", "target", "variant"], registry=registry
        )
        self.ready = Gauge("fovea_ready", "1 while the service takes requests, else 0.", registry=registry)
        self._of_requests: dict[tuple[str, str], tuple[Counter, Histogram]] = {}

    def observe_request(self, model: str, outcome: str, seconds: float) -> None:
        """Count an answered request; metrics are looked up by their labels once, not for every one."""
        found = self._of_requests.get((model, outcome))
        if found is None:
            found = self.requests.labels(model, outcome), self.request_duration.labels(model)
            self._of_requests[model, outcome] = found
        found[0].inc()
        found[1].observe(seconds)


def create_registry() -> CollectorRegistry:
    """A registry with the process, platform and garbage-collector metrics of prometheus_client."""
    disable_created_metrics()  # type: ignore[no-untyped-call]  # else a gauge of its own for every series
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry
