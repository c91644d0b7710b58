import ast
import re
from pathlib import Path

import pytest
import torch

import a2c
import ppo

ROOT = Path(ppo.__file__).parent


@pytest.fixture(autouse=True)
def the_same_start_for_each_test(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


def definitions(script):
    source = (ROOT / script).read_text()
    return {
        node.name: ast.get_source_segment(source, node)
        for node in ast.parse(source).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    }


def test_what_the_scripts_have_in_common_is_the_same_text():
    ours, theirs = definitions("ppo.py"), definitions("a2c.py")
    assert list(ours) == list(theirs)
    assert {name for name in ours if ours[name] != theirs[name]} == {"Args", "check_args", "train"}


def test_the_scripts_need_the_same_packages():
    headers = [(ROOT / script).read_text().split('"""')[0] for script in ("ppo.py", "a2c.py")]
    assert headers[0] == headers[1]


@pytest.mark.slow
@pytest.mark.parametrize("env_id", ["CartPole-v1", "MountainCarContinuous-v0"])
def test_ppo_with_one_minibatch_once_is_a2c(env_id, tmp_path):
    # The two sum the same float32 gradient in another order, and after hundreds of steps of Adam differ by some 1e-6.
    # The rollouts hold terminations, truncations (of the continuous task) and reset rows.
    flags = {"env_id": env_id, "num_envs": 4, "num_steps": 16, "total_timesteps": 20_000, "gae_lambda": 0.95}
    flags |= {"learning_rate": 1e-3, "gamma": 0.9, "final_gamma": 0.99, "normalize_reward": True}
    flags |= {"ent_coef": 0.01, "vf_coef": 0.5}
    agents = [
        a2c.train(a2c.Args(**flags, optimizer="adam", run_dir=str(tmp_path / "a2c"))),
        ppo.train(
            ppo.Args(**flags, update_epochs=1, num_minibatches=1, norm_adv=False, run_dir=str(tmp_path / "ppo"))
        ),
    ]
    untrained = a2c.Agent(a2c.make_envs(a2c.Args(**flags)))
    for ours, theirs, start in zip(*(agent.parameters() for agent in agents), untrained.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        assert (ours - start).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_the_default_flags_solve_cartpole(seed, tmp_path, capsys):
    a2c.train(a2c.Args(seed=seed, run_dir=str(tmp_path / "run")))
    assert float(re.search(r"return (\S+),", capsys.readouterr().out)[1]) >= 475


@pytest.mark.parametrize("optimizer", ["rmsprop", "adam"])
def test_images_and_box_actions_train(optimizer, tmp_path):
    pytest.importorskip("ale_py")
    for env_id in ("ALE/Pong-v5", "Pendulum-v1"):
        flags = {"env_id": env_id, "num_envs": 2, "num_steps": 8, "total_timesteps": 32, "optimizer": optimizer}
        agent = a2c.train(a2c.Args(**flags, run_dir=str(tmp_path / env_id.replace("/", "-"))))
        assert all(torch.isfinite(parameter).all() for parameter in agent.parameters())


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-2, 1.0])
def test_rmsprop_steps_as_far_as_that_of_the_paper(scale, tmp_path, monkeypatch):
    # The A3C paper has g / sqrt(v + eps), PyTorch g / (sqrt(v) + eps): with the same eps, 1e-5, it would step hundreds
    # of times as far along a gradient that vanishes, as the noise of a solved task does.
    settings, step = [], torch.optim.RMSprop.step
    monkeypatch.setattr(
        torch.optim.RMSprop, "step", lambda self: (settings.append(dict(self.param_groups[0])), step(self))
    )
    a2c.train(a2c.Args(num_envs=2, num_steps=4, total_timesteps=16, run_dir=str(tmp_path / "run")))
    assert len(settings) == 2
    monkeypatch.undo()
    parameter, v = torch.nn.Parameter(torch.zeros(50)), torch.zeros(50)
    optimizer = torch.optim.RMSprop([parameter], **{k: x for k, x in settings[0].items() if k != "params"})
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        gradient = scale * torch.randn(50, generator=generator)
        v = 0.99 * v + 0.01 * gradient.square()
        before, parameter.grad = parameter.detach().clone(), gradient
        optimizer.step()
        ratio = (before - parameter.detach()) / (settings[0]["lr"] * gradient / (v + 1e-5).sqrt())
        assert 0.7 < ratio.min() and ratio.max() < 1.001
