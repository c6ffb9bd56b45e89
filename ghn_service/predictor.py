"""The whole data path on one screen: bytes -> graph -> features -> embeddings -> blocks -> tensors -> steps.

A prediction depends on the architecture, the checkpoint, the options and the seed, and on nothing else: each tensor
that is drawn has a generator of its own, and nothing is kept between predictions.
"""

from __future__ import annotations

import fnmatch
import functools
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ghn_service.errors import (
    DeviceLostError,
    InvalidArchitectureError,
    InvalidOptionError,
    LimitExceededError,
    OutOfMemoryError,
    PredictionError,
    SourceError,
    UnsupportedArchitectureError,
    memory_errors,
)
from ghn_service.graph.architecture import ArchitectureGraph, ParameterSpec
from ghn_service.graph.onnx.reader import read_onnx
from ghn_service.graph.passes import reset_head, restrict_vocabulary
from ghn_service.graph.raw_graph import GraphLimits, never_ends
from ghn_service.hypernetwork.checkpoint import CheckpointSummary, load_checkpoint
from ghn_service.hypernetwork.download import find_checkpoint
from ghn_service.hypernetwork.features import Target, build_features, collate, copied_values, find_targets, is_tiled
from ghn_service.hypernetwork.fill import MAX_ELEMENTS_HELD, fill_parameters
from ghn_service.hypernetwork.ghn import GraphHyperNetwork
from ghn_service.parameters import (
    PREDICTED,
    TILED,
    ParameterSet,
    allocate_tensors,
    fallback_origin,
    source_origin,
)
from ghn_service.postprocess.diversity import build_report, encode_picture, measure_network
from ghn_service.postprocess.low_rank.output import LowRankRecord, apply_low_rank
from ghn_service.postprocess.low_rank.ranks import LowRank
from ghn_service.postprocess.options import require_known
from ghn_service.postprocess.steps import Step, apply_steps, parse_steps
from ghn_service.postprocess.weighted_layers import StepRecord
from ghn_service.transfer.auto import MINIMUM_SIMILARITY, choose_source
from ghn_service.transfer.library import AUTO, Library
from ghn_service.transfer.source import Source
from ghn_service.transfer.transfer import TARGET_FIELD, Head, Transfer, TransferPlan, plan_transfer, transfer_weights
from ghn_service.trust import METADATA_KEY, KnownData, Trust, decode_statistics, judge

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
READING, ENCODING, DECODING, POST_PROCESSING = "reading", "encoding", "decoding", "post-processing"
TRANSFERRING = "transferring"
MAX_SEED = 2**64 - 1
HEADS = ("auto", "predicted", "reset")

OnStage = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PredictionOptions:
    """What may be chosen for a prediction.

    Attributes:
        dtype: Element type of the tensors: ``float32``, ``float16`` or ``bfloat16``.
        seed: Seeds everything that is drawn, 0 to 2**64 - 1.
        steps: Post-processing, in order.
        low_rank: Asks for low-rank factors in the place of weights; None for dense weights.
        include: Shell-style patterns on the architecture's tensor names; only matching tensors are returned, factors
            with the weight that they stand for. Empty for all.
        report: Whether to measure the diversity of the weights before and after post-processing.
        head: What becomes of the classifier: ``predicted`` (rows are repeated or left out to fit another number of
            classes), ``reset`` (drawn anew), or ``auto``: reset where the number of classes is not the hypernetwork's.

    Raises:
        InvalidOptionError: A value is impossible; ``field`` names it.
    """

    dtype: str = "float32"
    seed: int = 0
    steps: tuple[Step, ...] = ()
    low_rank: LowRank | None = None
    include: tuple[str, ...] = ()
    report: bool = False
    head: str = "auto"

    def __post_init__(self) -> None:
        require_known(self.head, HEADS, field="head")
        require_known(self.dtype, DTYPES, field="dtype")
        if not 0 <= self.seed <= MAX_SEED:
            raise InvalidOptionError(f"seed must be from 0 to 2**64 - 1; got {self.seed}", field="seed")
        if self.steps:
            parse_steps(self.steps)

    @property
    def has_steps(self) -> bool:
        """Whether anything is done with the weights after they are predicted."""
        return bool(self.steps) or self.low_rank is not None or self.report

    def includes(self, name: str) -> bool:
        """Whether the tensor of this name is wanted."""
        return not self.include or _matcher(self.include)(name) is not None


@dataclass(frozen=True, eq=False, slots=True)
class PlannedTransfer:
    """A trained network that a prediction takes weights from, wherever they fit.

    Attributes:
        source: The trained network.
        structure: The architecture, as serialised ONNX.
        plan: What fits.
        head: What becomes of the class layer.
        post_process: Whether post-processing changes what the source gives; else predicted tensors alone.
    """

    source: Source
    structure: bytes
    plan: TransferPlan
    head: Head = "auto"
    post_process: bool = False

    @property
    def origins(self) -> dict[str, str]:
        """Origin of every tensor that the source gives, running statistics included."""
        return {name: source_origin(self.source.name, how) for name, how in self.plan.origins.items() if how != "none"}

    def carry_out(self, seed: int, check: Callable[[], None] = never_ends) -> Transfer:
        """The weights; ``check`` is called before every tensor, and what it raises ends the transfer."""
        return transfer_weights(self.source, self.structure, self.plan, head=self.head, seed=seed, check=check)


def plan_source(
    library: Library,
    name: str,
    structure: bytes,
    *,
    head: Head = "auto",
    post_process: bool = False,
    limits: GraphLimits | None = None,
    parameters: Sequence[ParameterSpec] = (),
    check: Callable[[], None] = never_ends,
) -> tuple[PlannedTransfer | None, tuple[str, ...]]:
    """What a source of a library gives an architecture; other arguments as in ``PlannedTransfer``.

    Args:
        library: Where sources are.
        name: One of them; ``auto`` for the one that fits best.
        structure: The architecture, which has been read within the limits already.
        head: What becomes of the class layer.
        post_process: Whether post-processing changes what the source gives.
        limits: The largest network that is read.
        parameters: Those of the architecture, as they are predicted.
        check: Called every few milliseconds; what it raises ends the planning.

    Returns:
        The plan; or None where ``auto`` finds no source that pays, and why, in sentences.

    Raises:
        UnknownModelError: There is no such source.
        SourceError: It has no weights, cannot be read, or has nothing in common with the architecture.
        LimitExceededError: The architecture's channels take too long to tell apart.
    """
    if name == AUTO:
        choice = choose_source(library, structure, head=head, limits=limits, parameters=parameters, check=check)
        if choice.source is None or choice.plan is None:
            return None, (
                f"The hypernetwork alone serves this architecture better than any source: {choice.reasons[0]}",
            )
        return PlannedTransfer(choice.source, structure, choice.plan, head, post_process), ()
    source = library.load(name)
    try:
        plan = plan_transfer(source, structure, head=head, limits=limits, parameters=parameters, check=check)
    except (InvalidArchitectureError, UnsupportedArchitectureError, LimitExceededError) as error:
        if error.field == TARGET_FIELD:
            raise
        raise SourceError(f"the source {source.name!r} cannot be read: {error}", field="source") from error
    return PlannedTransfer(source, structure, plan, head, post_process), ()


@functools.lru_cache(maxsize=256)
def _matcher(patterns: tuple[str, ...]) -> Callable[[str], re.Match[str] | None]:
    """Matches a name with any of the patterns; to compile them takes far longer than to match."""
    return re.compile("|".join(map(fnmatch.translate, patterns))).match


@dataclass(frozen=True, eq=False, slots=True)
class PredictionResult:
    """A prediction and how it came about.

    Attributes:
        parameters: The tensors, on the CPU.
        graph: The architecture as it was read.
        seconds: Seconds by stage: ``reading`` (if bytes were given), ``transferring``, ``encoding``, ``decoding``,
            ``post-processing``.
        records: What each post-processing step did.
        low_rank: What became of each layer, if factors were asked for.
        report: The diversity report as values that ``json`` writes, if it was asked for.
        transfer: The source, if one was asked for.
        statistics: Running means and variances that come with a source's weights, in float32.
        trust: How much to expect of the weights.
    """

    parameters: ParameterSet
    graph: ArchitectureGraph
    seconds: Mapping[str, float]
    records: tuple[StepRecord, ...] = ()
    low_rank: LowRankRecord | None = None
    report: Mapping[str, Any] | None = None
    transfer: PlannedTransfer | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    trust: Trust | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all values together."""
        return self.parameters.num_bytes + sum(value.nbytes for value in self.statistics.values())


@dataclass(frozen=True, slots=True)
class ArchitectureAnalysis:
    """What a prediction would do.

    Attributes:
        graph: The architecture as it was read.
        specs: Every trainable tensor, in the order of a reply.
        origins: Origin of each tensor by name: ``predicted``, ``tiled``, ``fallback:<rule>`` or
            ``source:<name> (<how>)``.
        op_types: Type of the node that stands for each tensor by name; "" if none does.
        warnings: What is not understood, or what the user should know; sentences.
        low_rank: What low rank would do with each layer, if it was asked for.
        transfer: The source, if one was asked for.
        trust: How much to expect of the weights.
    """

    graph: ArchitectureGraph
    specs: Mapping[str, ParameterSpec]
    origins: Mapping[str, str]
    op_types: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    low_rank: LowRankRecord | None = None
    transfer: PlannedTransfer | None = None
    trust: Trust | None = None

    @property
    def statistics(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of the running statistics that come with a source's weights."""
        given = self.transfer.origins if self.transfer else {}
        return {buffer.name: buffer.shape for buffer in self.graph.buffers if buffer.name in given}

    @property
    def num_predicted_parameters(self) -> int:
        """Trainable scalars that the hypernetwork would predict."""
        return sum(spec.num_elements for name, spec in self.specs.items() if self.origins[name] in (PREDICTED, TILED))


class Predictor:
    """Predicts weights with one hypernetwork on one device. Calls must not overlap.

    Args:
        ghn: The hypernetwork.
        summary: What its checkpoint holds; None for a hypernetwork that never was in a file.
    """

    def __init__(self, ghn: GraphHyperNetwork, summary: CheckpointSummary | None = None) -> None:
        self.ghn = ghn.eval()
        self.summary = summary

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, device: str = "auto", compute_dtype: str = "float32") -> Predictor:
        """Loads a checkpoint.

        Args:
            path: A file of ``hypernetwork.checkpoint``, or what ``hypernetwork.download`` fetches.
            device: ``auto`` (CUDA if there is any, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
            compute_dtype: Element type in which weights of two and more axes are decoded: ``float32``, or ``bfloat16``,
                which takes half the memory and on processors that know it half the time, for a deviation of about one
                part in a hundred (``docs/performance.md``).

        Raises:
            CheckpointError: The file is no checkpoint.
            InvalidOptionError: There is no such device.
        """
        ghn, summary = load_checkpoint(find_checkpoint(str(path)), device=choose_device(device))
        ghn.decode_matrices_in(DTYPES[compute_dtype])
        return cls(ghn, summary)

    @property
    def device(self) -> torch.device:
        """Where the hypernetwork is."""
        return self.ghn.device

    @functools.cached_property
    def known_data(self) -> KnownData:
        """What the hypernetwork was trained on, as far as the checkpoint says so.

        Raises:
            CheckpointError: The checkpoint says it in a form that cannot be read.
        """
        if self.summary is None:
            return KnownData(self.ghn.config.num_classes)
        details = self.summary.card.details
        channels, size = (
            value if isinstance(value := details.get(key), int) else 0 for key in ("channels", "image_size")
        )
        text = details.get(METADATA_KEY)
        return KnownData(self.ghn.config.num_classes, channels, size, decode_statistics(text) if text else None)

    def predict(
        self, architecture: ArchitectureGraph | bytes, *, options: PredictionOptions | None = None
    ) -> ParameterSet:
        """Predicts every trainable tensor of an architecture; see ``run``."""
        return self.run(architecture, options=options).parameters

    @torch.inference_mode()
    def run(
        self,
        architecture: ArchitectureGraph | bytes,
        *,
        options: PredictionOptions | None = None,
        on_stage: OnStage | None = None,
        transfer: PlannedTransfer | None = None,
    ) -> PredictionResult:
        """Predicts every trainable tensor of an architecture, but for those that a source gives.

        Args:
            architecture: A graph, or a serialised ONNX model.
            options: What may be chosen; None for the defaults.
            on_stage: Called with the name of a stage when it begins, and again while it goes on; what it raises ends
                the prediction.
            transfer: A trained network to take weights from, wherever they fit; what it gives unchanged shares its
                memory.

        Raises:
            InvalidArchitectureError: The bytes are no such network.
            UnsupportedArchitectureError: The network uses something without meaning here.
            LimitExceededError: The network is too large.
            PredictionError: A predicted value is not finite.
            SourceError: A value of the source is not finite.
            OutOfMemoryError: The device has not enough memory for this network.
            DeviceLostError: The device is in a state that this process cannot leave, such as after a failed assertion.
        """
        options = options or PredictionOptions()
        clock = _StageClock(on_stage)
        try:
            with memory_errors(f"{self.device} has too little memory for this network; ask for a part, or float16"):
                graph = _read(architecture, clock)
                known = self._prepare(graph, options.head, transfer)
                given: Mapping[str, Tensor] = {}
                statistics: Mapping[str, Tensor] = {}
                if transfer is not None:
                    with clock.stage(TRANSFERRING):
                        found = transfer.carry_out(options.seed, functools.partial(clock.tick, TRANSFERRING))
                        given, statistics = found.tensors, _converted(found.statistics, torch.float32)
                origins, copied = self._origins(known, transfer)
                trust = judge(known, origins, copied, self.known_data, is_near=_is_near(transfer))
                parameters = self._make_parameters(known, given, transfer.origins if transfer else {}, options, clock)
                result = PredictionResult(parameters, graph, clock.seconds)
                if options.has_steps:
                    kept = () if transfer and transfer.post_process else given
                    with clock.stage(POST_PROCESSING):
                        result = self._post_process(parameters, known, options, clock, kept)
                report = result.report
                if report is not None:
                    report = {"trust": asdict(trust), **report, "graph": encode_picture(known, origins, copied)}
                statistics = {name: value for name, value in statistics.items() if options.includes(name)}
                return replace(
                    result, graph=graph, transfer=transfer, statistics=statistics, trust=trust, report=report
                )
        except OutOfMemoryError:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            raise
        except torch.AcceleratorError as error:
            if device_works(self.device):
                raise
            raise DeviceLostError(f"{self.device} failed for good, so this server must be started anew") from error

    def analyze(
        self, architecture: ArchitectureGraph | bytes, *, transfer: PlannedTransfer | None = None, head: str = "auto"
    ) -> ArchitectureAnalysis:
        """Says what a prediction would do with each tensor, without predicting; raises as ``run`` does."""
        graph = _read(architecture, _StageClock(None))
        known = self._prepare(graph, head, transfer)
        specs = {spec.name: spec for spec in known.parameters()}
        origins, copied = self._origins(known, transfer)
        return ArchitectureAnalysis(
            graph=graph,
            specs=specs,
            origins=origins,
            op_types=dict.fromkeys(specs, "")
            | {spec.name: node.op_type for node in known.nodes for spec in node.parameters},
            warnings=known.warnings,
            transfer=transfer,
            trust=judge(known, origins, copied, self.known_data, is_near=_is_near(transfer)),
        )

    def _prepare(self, graph: ArchitectureGraph, head: str, transfer: PlannedTransfer | None) -> ArchitectureGraph:
        """The graph in the hypernetwork's vocabulary, with a classifier that a rule draws where that is asked for."""
        known = restrict_vocabulary(graph, self.ghn.config.op_types)
        if transfer is not None:
            known = replace(known, warnings=(*known.warnings, *transfer.plan.warnings))
        if head == "predicted" or (head == "auto" and known.num_classes == self.ghn.config.num_classes):
            return known
        return reset_head(known)

    def _origins(
        self, graph: ArchitectureGraph, transfer: PlannedTransfer | None
    ) -> tuple[dict[str, str], dict[str, int]]:
        """Origin of every tensor, and how many values of each tiled one are copies."""
        targets = {target.name: target for target in find_targets(graph)}
        given = transfer.origins if transfer else {}
        origins = {
            spec.name: given.get(spec.name) or self._origin(spec, targets.get(spec.name)) for spec in graph.parameters()
        }
        tiled = [name for name, origin in origins.items() if origin == TILED]
        return origins, {name: copied_values(targets[name], self.ghn.config) for name in tiled}

    def _make_parameters(
        self,
        graph: ArchitectureGraph,
        given: Mapping[str, Tensor],
        origins: Mapping[str, str],
        options: PredictionOptions,
        clock: _StageClock,
    ) -> ParameterSet:
        """The wanted tensors; before steps, all of them, in float32 on the steps' device.

        The hypernetwork is asked only for what is not ``given`` by a source, with these ``origins``.
        """
        has_steps = options.has_steps
        wanted = {spec.name: spec for spec in graph.parameters() if has_steps or options.includes(spec.name)}
        dtype = torch.float32 if has_steps else DTYPES[options.dtype]
        device = self.device if has_steps else torch.device("cpu")
        taken = _converted({name: given[name] for name in wanted if name in given}, dtype, device)
        missing = {name: spec for name, spec in wanted.items() if name not in taken}
        if not taken:
            return self._decode(graph, missing, options, clock, dtype=dtype, device=device)
        predicted: Mapping[str, Tensor] = {}
        if missing:
            made = self._decode(graph, missing, options, clock, dtype=dtype, device=device)
            predicted, origins = made, {**origins, **made.origins}
        tensors = {name: taken[name] if name in taken else predicted[name] for name in wanted}
        return ParameterSet(wanted, tensors, {name: origins[name] for name in wanted}, graph.warnings)

    def _decode(
        self,
        graph: ArchitectureGraph,
        specs: Mapping[str, ParameterSpec],
        options: PredictionOptions,
        clock: _StageClock,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> ParameterSet:
        """Encodes the architecture, decodes the blocks of some tensors, and fills these."""
        with clock.stage(ENCODING):
            features = build_features(graph, self.ghn.config)
            embeddings = self.ghn.encode(collate([features]).to(self.device))
        with clock.stage(DECODING):
            by_name = {target.name: target for target in features.targets if target.name in specs}
            tensors = allocate_tensors(specs, dtype=dtype, device=device)
            origins = {name: self._origin(spec, by_name.get(name)) for name, spec in specs.items()}
            parameters = ParameterSet(specs, tensors, origins, graph.warnings)
            blocks = self.ghn.decode_blocks(
                embeddings, list(by_name.values()), seed=options.seed, max_elements=MAX_ELEMENTS_HELD
            )
            fill_parameters(
                parameters, blocks, graph, seed=options.seed, on_group=functools.partial(clock.tick, DECODING)
            )
        return parameters

    def _post_process(
        self,
        predicted: ParameterSet,
        graph: ArchitectureGraph,
        options: PredictionOptions,
        clock: _StageClock,
        kept: Collection[str],
    ) -> PredictionResult:
        """Steps, which leave ``kept`` alone, then the report about them, then factors."""
        on_layer = functools.partial(clock.tick, POST_PROCESSING)
        before = measure_network(predicted, graph, on_layer=on_layer) if options.report else {}
        parameters, records = apply_steps(
            predicted, graph, options.steps, seed=options.seed, kept=kept, on_layer=on_layer
        )
        report: dict[str, Any] | None = None
        if options.report:
            after = measure_network(parameters, graph, on_layer=on_layer) if options.steps else before
            report = build_report(graph, before, after, origins=predicted.origins, records=records)
        low_rank: LowRankRecord | None = None
        if options.low_rank is not None:
            parameters, low_rank = apply_low_rank(parameters, graph, options.low_rank, on_layer=on_layer)
        weights = {name: layer.parameter for layer in low_rank.layers for name in layer.factors} if low_rank else {}
        finished = _finished(parameters, options, weights)
        return PredictionResult(finished, graph, clock.seconds, records, low_rank, report)

    def _origin(self, spec: ParameterSpec, target: Target | None) -> str:
        if target is None:
            return fallback_origin(spec.fallback)
        return TILED if is_tiled(target, self.ghn.config) else PREDICTED


def device_works(device: torch.device) -> bool:
    """Whether a device still computes; after some faults of a GPU every call of its process fails."""
    try:
        return bool(torch.zeros(1, device=device).item() == 0)
    except RuntimeError:
        return False


def choose_device(name: str) -> torch.device:
    """The device of this name; ``auto`` is CUDA if there is any, else the CPU.

    Raises:
        InvalidOptionError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if re.fullmatch(r"cpu|cuda(:\d{1,3})?", name) is None:
        raise InvalidOptionError(f"device must be auto, cpu, cuda or cuda:N; got {name!r}", field="device")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidOptionError(
            f"device {name!r} is not here; there are {torch.cuda.device_count()} CUDA devices", field="device"
        )
    return device


def _read(architecture: ArchitectureGraph | bytes, clock: _StageClock) -> ArchitectureGraph:
    """The graph itself, or the one in a serialised ONNX model."""
    if isinstance(architecture, ArchitectureGraph):
        return architecture
    with clock.stage(READING):
        return read_onnx(architecture)


class _StageClock:
    """Seconds by stage, and the caller's word in between."""

    def __init__(self, on_stage: OnStage | None) -> None:
        self.seconds: dict[str, float] = {}
        self._on_stage = on_stage

    def tick(self, name: str) -> None:
        """Tells the caller that this stage goes on; the caller may raise."""
        if self._on_stage is not None:
            self._on_stage(name)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.tick(name)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def _is_near(transfer: PlannedTransfer | None) -> bool | None:
    """Whether a source was seen to pay with architectures as near as this one; None without one."""
    plan = transfer.plan if transfer else None
    return None if plan is None else plan.contains_source or plan.similarity >= MINIMUM_SIMILARITY


def _converted(
    given: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """A source's tensors as they are wanted; copies only where type or device differ.

    Raises:
        SourceError: A value is not finite, or is beyond the element type.
    """
    converted = {name: tensor.to(device=device, dtype=dtype).contiguous() for name, tensor in given.items()}
    for name, tensor in converted.items():
        if not tensor.sum(dtype=torch.float64).isfinite():
            raise SourceError(
                f"the values that the source gives for {name!r} are not all finite in {dtype}; check the source, or "
                "ask for float32",
                field="source",
            )
    return converted


def _finished(parameters: ParameterSet, options: PredictionOptions, weights: Mapping[str, str]) -> ParameterSet:
    """Post-processed parameters as they were asked for: checked, selected, converted, on the CPU.

    ``weights`` says for each factor which weight it stands for.
    """
    names = [name for name in parameters if options.includes(weights.get(name, name))]
    tensors = {name: parameters[name].to(device="cpu", dtype=DTYPES[options.dtype]).contiguous() for name in names}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise PredictionError(f"the post-processed values of {name!r} are not all finite; leave out a step")
    return ParameterSet(
        {name: parameters.specs[name] for name in names},
        tensors,
        {name: parameters.origins[name] for name in names},
        parameters.warnings,
    )
