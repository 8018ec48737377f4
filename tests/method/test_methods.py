"""Every method's loss against its equation, worked out from full logits of single sequences."""

import math

import numpy as np
import pytest
import torch

from tests.method.test_distillation import adapter_state, train
from tests.method.test_teacher import samples, teachers
from tests.padded import collate
from vgid.config import TrialConfig, uses
from vgid.errors import InputError
from vgid.method.distillation import DistillationSet, Student, distill, share
from vgid.method.methods import METHODS, make_method
from vgid.method.student import View
from vgid.method.teacher import Intervention
from vgid.models.adapters import attached
from vgid.models.encoding import encode
from vgid.models.packing import hidden_states

BASELINES = ["ga", "ga_diff", "kl_min", "po_idk", "po_dpo", "npo", "rmu"]
BETA, STEERING, LAYER = 0.3, 4.0, 2


def config_of(method: str, **settings) -> TrialConfig:
    own = {
        "po_dpo": {"preference_beta": BETA},
        "npo": {"preference_beta": BETA},
        "rmu": {"rmu_layer": LAYER, "rmu_steering": STEERING},
    }.get(method, {})
    if uses(method, "beta"):
        own["retain_batch_size"] = 3
    common = {"epochs": 2, "batch_size": 4, "lora_rank": 4, "learning_rate": 1e-2}
    return TrialConfig(method=method, **{**common, **own, **settings})


def sets(backbone, root, config, n=6):
    """Forget and retain sets as a trial makes them."""
    store, method = teachers(root, backbone), make_method(config, backbone)
    chosen = samples(n + 3)
    forget, retain = chosen[:n], chosen[3:]
    made = []
    for group, teacher in (
        (forget, method.forget_teachers(seed=1)),
        (retain, [(Intervention(), "reference")]),
    ):
        targets = [store.targets(group, intervention, source) for intervention, source in teacher]
        prompts = encode(backbone, [s.query for s in group])
        paired = method.paired and group is forget
        made.append(DistillationSet(prompts, targets, [s.task for s in group], paired))
    return tuple(made)


def shaken(model):
    """Give the fresh adapter an effect."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def alone(backbone, prompt, response, layer=LAYER):
    """One plain sequence: log-probabilities over the vocabulary, and a layer's states of text."""
    seen = []
    block = backbone.model.model.language_model.layers[layer - 1]
    hook = block.register_forward_hook(lambda _, inputs, output: seen.append(output))
    batch = collate(backbone, [prompt], [response])
    logits = backbone.model(**batch.inputs).logits[0, len(prompt.prompt_ids) - 1 : -1]
    hook.remove()
    image = [k for k, i in enumerate(prompt.identity) if i < 0]
    return logits.double().log_softmax(-1), seen[0][0, image[-1] + 1 :].double()


def sequences(backbone, model, data):
    """Every target of every sample: response, student's and base's view of it."""
    found = []
    for targets in data.targets:
        row = []
        for prompt, target in zip(data.prompts, targets, strict=True):
            student = alone(backbone, prompt, target.response)
            with model.disable_adapter():
                base = alone(backbone, prompt, target.response)
            row.append((target.response, student, base))
        found.append(row)
    return found


def picked(logp, response):
    return [logp[k, token].item() for k, token in enumerate(response)]


def mean_nll(rows):
    every = [-x for response, (logp, _), _ in rows for x in picked(logp, response)]
    return sum(every) / len(every)


def log_ratios(rows):
    """log pi_theta(y|x) - log pi_ref(y|x) of each response."""
    return [
        sum(picked(student[0], response)) - sum(picked(base[0], response))
        for response, student, base in rows
    ]


def mean_kl(rows):
    total, count = 0.0, 0
    for response, (student, _), (base, _) in rows:
        total += (base.exp() * (base - student)).sum().item()
        count += len(response)
    return total / count


def softplus(x):
    return math.log1p(math.exp(x))


def expected_forget(method, found, direction=None):
    if method in ("ga", "ga_diff", "kl_min"):
        return -mean_nll(found[0])
    if method == "po_idk":
        return mean_nll(found[0])
    if method == "npo":
        return np.mean([2 / BETA * softplus(BETA * r) for r in log_ratios(found[0])])
    if method == "po_dpo":
        pairs = zip(log_ratios(found[0]), log_ratios(found[1]), strict=True)
        return np.mean([softplus(-BETA * (chosen - rejected)) for chosen, rejected in pairs])
    distances = []
    for _, (_, hidden), (_, ref) in found[0]:
        target = STEERING * ref.norm(dim=-1)[:, None] * direction
        distances.append((hidden - target).square().sum(-1).mean().item())
    return np.mean(distances)


def expected_retain(method, found):
    if method == "ga_diff":
        return mean_nll(found[0])
    if method == "kl_min":
        return mean_kl(found[0])
    return np.mean([(h - r).square().sum(-1).mean().item() for _, (_, h), (_, r) in found[0]])


@pytest.mark.parametrize("method", BASELINES)
def test_the_loss_is_that_of_its_equation_whatever_the_shares(random_backbone, tmp_path, method):
    """All in one share, and in three ranks of two parts, which hold 1 sample each."""
    config = config_of(method)
    forget, retain = sets(random_backbone, tmp_path, config)
    retain = retain if uses(method, "beta") else None
    with attached(random_backbone, config) as model:
        shaken(model)
        made = make_method(config, random_backbone)
        direction = made.direction_D.double() if method == "rmu" else None
        expected = [expected_forget(method, sequences(random_backbone, model, forget), direction)]
        if retain is not None:
            found = sequences(random_backbone, model, retain)
            expected.append(expected_retain(method, found))
        student = Student(model, random_backbone, made)
        for ranks, parts in ((1, 1), (3, 2), (4, 2)):
            total = torch.zeros(2, dtype=torch.float64)
            for rank in range(ranks):
                for k in range(parts):
                    for term, data in enumerate((forget, retain)):
                        if data is None:
                            continue
                        whole = range(len(data))
                        mine = share(random_backbone, data, whole, 0, rank, ranks, parts)[k]
                        with torch.no_grad():
                            total[term] += student(mine, ("forget", "retain")[term]).double()
            assert total[: len(expected)].tolist() == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("method", BASELINES)
def test_training_moves_the_forget_loss_down(random_backbone, tmp_path, method):
    config = config_of(method, epochs=3, learning_rate=3e-3)
    forget, retain = sets(random_backbone, tmp_path, config)
    _, reports = train(random_backbone, forget, retain if uses(method, "beta") else None, config)
    losses = [report.metrics["forget_loss"] for report in reports]
    assert losses[0] > losses[1] > losses[2]
    assert ("retain_loss" in reports[0].metrics) == uses(method, "beta")
    last = reports[-1].metrics
    kept = config.beta * last["retain_loss"] if "retain_loss" in last else 0.0
    assert last["loss"] == config.alpha * last["forget_loss"] + kept


def test_every_method_has_its_class_and_a_retain_loss_exactly_where_beta_is_used(
    random_backbone, tmp_path
):
    for method in METHODS:
        config = config_of(method)
        forget, _ = sets(random_backbone, tmp_path, config)
        with attached(random_backbone, config) as model, torch.no_grad():
            (part,) = share(random_backbone, forget, range(2), 0)
            made = make_method(config, random_backbone)
            loss = made.retain_loss(View(random_backbone, model, part))
        assert (loss is not None) == uses(method, "beta")


def test_icu_t_and_noise_t_are_one_half_of_vgid_s_teacher(random_backbone):
    def teachers_of(**settings):
        return make_method(TrialConfig(**settings), random_backbone).forget_teachers(seed=7)

    both = {"response_source": "reference"}
    assert teachers_of(method="icu_t", prompt_style="polite", **both) == [
        (Intervention(None, None, "polite", 7), "reference")
    ]
    assert teachers_of(method="noise_t", noise_type="gaussian", sigma=0.4, **both) == [
        (Intervention("gaussian", 0.4, None, 7), "reference")
    ]
    assert teachers_of(noise_type="gaussian", sigma=0.4, prompt_style="polite") == [
        (Intervention("gaussian", 0.4, "polite", 7), source) for source in ("teacher", "reference")
    ]


@pytest.mark.parametrize(
    ("method", "forget_loss"),
    [("npo", 2 / BETA * math.log(2)), ("po_dpo", math.log(2)), ("kl_min", None), ("rmu", None)],
)
def test_references_are_the_base_so_that_step_0_is_known(
    random_backbone, tmp_path, method, forget_loss
):
    config = config_of(method)
    forget, retain = sets(random_backbone, tmp_path, config)
    with attached(random_backbone, config) as model, torch.no_grad():
        student = Student(model, random_backbone, make_method(config, random_backbone))
        (mine,) = share(random_backbone, forget, range(6), 0)
        (kept,) = share(random_backbone, retain, range(6), 0)
        if forget_loss is not None:
            assert student(mine, "forget").item() == pytest.approx(forget_loss, rel=1e-5)
        if uses(method, "beta"):
            assert student(kept, "retain").item() == 0.0  # exactly


def test_a_pair_is_the_same_sample_refused_and_answered(random_backbone, tmp_path):
    forget, _ = sets(random_backbone, tmp_path, config_of("po_dpo"))
    for epoch in range(2):
        for rank in range(2):
            (part,) = share(random_backbone, forget, range(5), epoch, rank, 2)
            refusals, answers = np.array_split(np.array(part.packed.responses, dtype=object), 2)
            known = [
                (refusal.response, answer.response)
                for refusal, answer in zip(*forget.targets, strict=True)
            ]
            pairs = list(zip(refusals.tolist(), answers.tolist(), strict=True))
            assert len(pairs) == (3, 2)[rank]
            assert all(pair in known for pair in pairs)


def test_layer_hidden_is_the_layer_s_own_output_without_running_those_above(
    random_backbone, tmp_path
):
    config = config_of("rmu")
    forget, _ = sets(random_backbone, tmp_path, config)
    layers = random_backbone.model.model.language_model.layers
    with attached(random_backbone, config) as model, torch.no_grad():
        shaken(model)
        (part,) = share(random_backbone, forget, range(6), 0)
        view = View(random_backbone, model, part)
        above = []
        hook = layers[LAYER].register_forward_hook(lambda *_: above.append(1))
        hidden = view.layer_hidden(LAYER)
        hook.remove()
        assert not above
        whole = []
        hook = layers[LAYER - 1].register_forward_hook(lambda _, i, output: whole.append(output))
        hidden_states(random_backbone, part.packed)
        hook.remove()
        for row, path, got in zip(part.packed.rows, part.packed.paths, hidden, strict=True):
            assert torch.equal(got, whole[0][row, path[len(path) - len(got) :]])
        base = view.ref_layer_hidden(LAYER)
        assert not any(torch.equal(a, b) for a, b in zip(hidden, base, strict=True))
        last = view.layer_hidden(len(layers))
        assert len(last) == 6
    assert random_backbone.model.model.language_model.layers is layers
    assert type(random_backbone.model.model.language_model.norm).__name__ == "LlamaRMSNorm"


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rmu_trains_the_layers_up_to_its_own(random_backbone, tmp_path, checkpointing):
    config = config_of("rmu", gradient_checkpointing=checkpointing)
    forget, retain = sets(random_backbone, tmp_path, config)
    with attached(random_backbone, config) as model:
        list(distill(random_backbone, model, forget, retain, config))
        b = {n: p for n, p in model.named_parameters() if "lora_B" in n}
    for name, value in b.items():
        layer = int(name.split(".layers.")[1].split(".")[0])
        assert bool((value != 0).any()) == (layer < LAYER), name


def test_rmu_resumes_from_its_checkpoint(random_backbone, tmp_path):
    config = config_of("rmu", epochs=3)
    forget, retain = sets(random_backbone, tmp_path, config)
    expected, reports = train(random_backbone, forget, retain, config)
    folder = tmp_path / "checkpoint"
    with attached(random_backbone, config) as model:
        run = distill(
            random_backbone, model, forget, retain, config, trial_id="7", checkpoint=folder
        )
        assert next(run) == reports[0]
        run.close()
    with attached(random_backbone, config) as model:
        run = distill(
            random_backbone, model, forget, retain, config, trial_id="7", checkpoint=folder
        )
        assert list(run) == reports
        got = adapter_state(model)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_rmu_s_direction_is_a_unit_vector_of_the_seed_and_its_layer_exists(random_backbone):
    def direction(seed):
        return make_method(config_of("rmu", seed=seed), random_backbone).direction_D

    assert direction(0).norm().item() == pytest.approx(1.0, rel=1e-6)
    assert torch.equal(direction(0), direction(0))
    assert abs(direction(0) @ direction(1)) < 0.5
    default = make_method(TrialConfig(method="rmu"), random_backbone)
    depth = random_backbone.model.config.text_config.num_hidden_layers
    assert default.layer == depth // 3 == 1
    with pytest.raises(InputError, match=f"rmu_layer: tiny-llava has {depth} layers, got 9"):
        make_method(config_of("rmu", rmu_layer=9), random_backbone)
