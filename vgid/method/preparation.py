"""What training needs before an adapter is attached: samples, teachers' targets, batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from vgid.config import RequestConfig, TrialConfig, uses
from vgid.data.benchmark import Benchmark
from vgid.data.splits import People, held_out_of_training
from vgid.errors import SettingError
from vgid.method.distillation import DistillationSet, distill, retain_batches, steps_per_epoch
from vgid.method.interventions import portrait_view
from vgid.method.methods import make_method
from vgid.method.released import distill_released, retain_drawn
from vgid.method.samples import TrainingSample, training_samples
from vgid.method.teacher import PLAIN, TeacherStore, response_room
from vgid.method.workers import ALONE, Workers
from vgid.models.backbones import Backbone
from vgid.models.encoding import Encoded, encode, response_ids
from vgid.results import EpochReport

Prepared = tuple[Callable[[Any], Iterator[EpochReport]], Iterator[TrainingSample]]
"""What trains a PEFT model, epoch by epoch; and the retain samples that its steps draw."""


@dataclass
class Preparation:
    """Prepares trials of one forget request; keeps the samples and encodings that they share."""

    backbone: Backbone
    benchmark: Benchmark
    people: People
    request: RequestConfig
    store: TeacherStore
    workers: Workers = ALONE
    _samples: dict[tuple[Any, ...], list[TrainingSample]] = field(default_factory=dict)
    _encoded: dict[tuple[str, int], Encoded] = field(default_factory=dict)

    def training(self, trial: TrialConfig, trial_id: str, checkpoint: Path | None) -> Prepared:
        """What trains one trial; ``InputError`` for unfit data, or for a layer that is missing."""
        forget = self._asked(trial, forget=True)
        retain = self._asked(trial, forget=False) if uses(trial.method, "beta") else []
        if trial.released:
            return self._released(trial, forget, retain)
        method = make_method(trial, self.backbone)
        teachers = method.forget_teachers(self.request.seed)
        forget_set = DistillationSet(
            self._encode(forget),
            [self.store.targets(forget, *teacher) for teacher in teachers],
            [s.task for s in forget],
            method.paired,
            [self._encode(forget, view) for view in range(1, trial.views)],
        )
        retain_set = None
        retained: Iterator[TrainingSample] = iter(())
        if retain:
            seen = {person.id for person in self.people.retain_seen}
            retain_set = DistillationSet(
                self._encode(retain),
                [self.store.targets(retain, PLAIN, "reference")],
                [s.task for s in retain],
                first=[i for i, s in enumerate(retain) if s.person_id in seen],
            )
            steps = trial.epochs * steps_per_epoch(forget_set, trial)
            batches = islice(retain_batches(retain_set, trial), steps)
            retained = (retain[i] for batch in batches for i in batch)

        def epochs(model: Any) -> Iterator[EpochReport]:
            return distill(
                self.backbone,
                model,
                forget_set,
                retain_set,
                trial,
                method=method,
                trial_id=trial_id,
                workers=self.workers,
                checkpoint=checkpoint,
            )

        return epochs, retained

    def _released(
        self, trial: TrialConfig, forget: list[TrainingSample], retain: list[TrainingSample]
    ) -> Prepared:
        if self.workers.count > 1:
            raise SettingError("released: the public script's variant runs in one worker only.")

        def answered(samples: list[TrainingSample]) -> list[tuple[Encoded, list[int]]]:
            # The script's answers do not end.
            responses = [response_ids(self.backbone, sample.answer)[:-1] for sample in samples]
            return list(zip(self._encode(samples), responses, strict=True))

        sets = answered(forget), answered(retain)
        drawn = (retain[i] for i in retain_drawn(len(forget), len(retain), trial))
        return lambda model: distill_released(self.backbone, model, *sets, trial), drawn

    def _asked(self, trial: TrialConfig, forget: bool) -> list[TrainingSample]:
        key = (trial.train_tasks, trial.train_wording, forget)
        if key not in self._samples:
            self._samples[key] = training_samples(
                self.benchmark,
                self.people.forget if forget else self.people.retain_pool,
                trial,
                self.backbone.spec.option_scoring == "likelihood",
                self.request.seed,
                held_out_of_training(self.people, self.request),
            )
        return self._samples[key]

    def _encode(self, samples: Sequence[TrainingSample], view: int = 0) -> list[Encoded]:
        pictures: dict[str, Image.Image] = {}
        for sample in samples:
            query, portrait = sample.query, sample.portrait
            if (query.id, view) in self._encoded:
                continue
            if query.image is not None:
                if portrait not in pictures:
                    pictures[portrait] = portrait_view(query.image, view, self.request.seed)
                query = replace(query, image=pictures[portrait])
            room = response_room(self.backbone, sample)
            (self._encoded[query.id, view],) = encode(self.backbone, [query], room=room)
        return [self._encoded[sample.query.id, view] for sample in samples]
