"""Runs as compare.py keeps them, of tiny models whose adapters and gates do something though nothing was trained."""

import json

from recommenders import prompts_of, recommender
from sequential_recommendation.experiments import PROMPTS, Arm, Experiment, Run
from sequential_recommendation.tiny_model import tiny_lm
from sequential_recommendation.training import TrainingSettings

FILMS = (
    ["Toy Story (1995)", "Usual Suspects, The (1995)", "Alien (1979)", "Sabrina (1954)", "Sabrina (1995)"]
    + ["Bonheur, Le (1965)", "Amélie & Co. (1997)", "Chasing Amy (1997)", "Chasing Amy (1997)", "Heat <b>(1995)"]
    + [f"Film number {n} ({1960 + n})" for n in range(30)]
)


def movielens_files(folder):
    """u.item and u.data of FILMS: user u met the ten films from u on; the second Chasing Amy was met most."""
    folder.mkdir(parents=True)
    folder.joinpath("u.item").write_text(
        "".join(f"{i}|{t}{'|' * 3}{'|0' * 19}\n" for i, t in enumerate(FILMS)), encoding="latin-1"
    )
    met = [(user, (user + step) % len(FILMS), step) for user in range(20) for step in range(10)]
    met += [(20 + n, item, step) for n in range(5) for step, item in enumerate([8, 11, 12, 13])]
    folder.joinpath("u.data").write_text("".join(f"{u}\t{i}\t5\t{t + 880_000_000}\n" for u, i, t in met))
    return folder


def kept_run(out, gate="sequence", seed=0, validation=None, **experiment):
    """Writes a run below out and returns its folder. experiment: fields of `Experiment`; made-up users by default."""
    experiment = {"users": 40, **experiment}
    described = Experiment(out / f"{experiment.get('data', 'tastes')}-leave-one-out-tiny", **experiment)
    dataset, E = described.dataset(), 1 if gate == "uniform" else 4
    prompts = prompts_of(dataset, PROMPTS[described.data])
    lm = tiny_lm(prompts.tokenizer, 32, 2, 2)
    if not described.lm_folder.exists():
        lm.save_pretrained(described.lm_folder)
    model = recommender(gate, prompts, seed, lm, std=(0.3, 0.3))
    settings, fingerprint = TrainingSettings(seed=seed), described.fingerprint(dataset)
    run = Run(described, Arm(f"iLoRA, {gate}", gate, E), settings, fingerprint=fingerprint)
    model.save(run.folder / "recommender")
    (run.folder / "run.json").write_text(json.dumps(run.described(), indent=1))
    if validation is not None:
        run.file.write_text(json.dumps({"validation": {"hit_ratio": validation, "ndcg": 0.0}}))
    return run.folder
