"""Evaluates the policy on a server with Stable-Baselines3's own `evaluate_policy`.

pip install stable-baselines3
python examples/sb3_evaluate.py --url http://127.0.0.1:8000
"""

from __future__ import annotations

import argparse
from functools import partial

from gymnasium_loop import Walk
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from tamiyo_client import VectorPolicyClient

NUM_ENVS = 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--episodes", type=int, default=20)
    options = parser.parse_args()
    with VectorPolicyClient(options.url, NUM_ENVS, seed=7) as client:
        spec = client.policy()["spec"]
        heads = {head["name"]: head["size"] for head in spec["heads"]}
        envs = DummyVecEnv([partial(Walk, spec["observation_dim"], heads)] * NUM_ENVS)
        envs.seed(7)
        mean, deviation = evaluate_policy(
            client, envs, n_eval_episodes=options.episodes, deterministic=True, warn=False
        )
    print(f"{options.episodes} episodes: {mean:.2f} +- {deviation:.2f}")


if __name__ == "__main__":
    main()
