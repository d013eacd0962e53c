"""Rules about learning from rewards: grpo, rloo, ppo. Each rule's page has the sources (`rules/CODE.md`)."""

from __future__ import annotations

import math

from finetuneflow.knowledge.situation import Hit, Situation, many, rule
from finetuneflow.knowledge.values import DataFacts

OFF_TEMPERATURE = 0.3  # further from 1 than this
USUAL_KL = 0.05
ANSWER_PERCENTILE = 90
LONGEST_ANSWER = 32_768


@rule("REWARD_MISSING", "error", "No reward to learn from")
def reward_missing(s: Situation) -> Hit | None:
    if not s.traits.draws or s.config.reinforcement.reward:
        return None
    return Hit(
        "reinforcement.reward",
        "empty",
        f"{s.config.training.objective} learns from what its answers are paid, and 0 rewards are named. `ftf rewards` lists the built-in ones.",
    )


@rule("REWARD_OUTSIDE_FOLDER", "error", "A reward function outside the folder that may be read")
def reward_outside_folder(s: Situation) -> Hit | None:
    refused = s.config.rewards_not_allowed() if s.traits.draws else []
    if not refused:
        return None
    name, problem = refused[0]
    return Hit(
        "reinforcement.reward",
        name,
        f"{len(refused)} of {len(s.config.reinforcement.reward)} rewards would run code that the run file may not name: {name} {problem}.",
    )


@rule("REWARD_WEIGHTS_MISMATCH", "error", "Weights that do not match the rewards")
def reward_weights_mismatch(s: Situation) -> Hit | None:
    drawn = s.config.reinforcement
    if not s.traits.draws or not drawn.reward_weights or len(drawn.reward_weights) == len(drawn.reward):
        return None
    return Hit(
        "reinforcement.reward_weights",
        f"{many(len(drawn.reward_weights), 'weight')} for {many(len(drawn.reward), 'reward')}",
        "Each reward needs one weight, in the same order; without any, all count 1.",
        {"reinforcement.reward_weights": []},
    )


@rule("GROUP_NOT_WHOLE", "error", "A step that does not hold whole groups of answers")
def group_not_whole(s: Situation) -> Hit | None:
    training, size = s.config.training, s.config.reinforcement.samples_per_prompt
    if s.traits.family != "group" or training.effective_batch % size == 0:
        return None
    accumulation = size // math.gcd(training.batch_size, size)
    accumulation *= max(1, round(training.gradient_accumulation / accumulation))
    return Hit(
        "training.gradient_accumulation",
        f"{training.effective_batch} answers per step, {size} to each prompt",
        f"{size} answers to a prompt are compared with each other, so all of them belong into one step: {training.effective_batch} is no "
        f"multiple of {size}. The run refuses it.",
        {"training.gradient_accumulation": accumulation},
        safe=True,
    )


@rule("KL_OFF", "advice", "Nothing holds the policy to the model it started from")
def kl_off(s: Situation) -> Hit | None:
    if not s.traits.draws or s.config.reinforcement.kl_coefficient > 0:
        return None
    return Hit(
        "reinforcement.kl_coefficient",
        "0",
        "Whatever the reward does not measure is free to get worse: answers drift into what is paid and no longer read well (reward "
        f"hacking). {USUAL_KL:g} per token is the usual price for drifting. Only exact rewards, such as a right number, bear 0.",
        {"reinforcement.kl_coefficient": USUAL_KL},
    )


@rule("TEMPERATURE_OFF_POLICY", "warning", "Answers drawn from another distribution than the one that is trained")
def temperature_off_policy(s: Situation) -> Hit | None:
    drawn = s.config.reinforcement
    far = abs(drawn.temperature - 1) > OFF_TEMPERATURE + 1e-9
    if not s.traits.draws or not (far or drawn.top_p < 1):
        return None
    key, value = ("temperature", drawn.temperature) if far else ("top_p", drawn.top_p)
    cold = drawn.temperature < 1 or drawn.top_p < 1
    return Hit(
        f"reinforcement.{key}",
        f"{value:g}",
        "The gradient is that of the distribution answers are drawn from; users get the one at temperature 1, whole. "
        + (
            "Drawn colder, the answers to a prompt are alike, and there is nothing to compare."
            if cold
            else "Drawn hotter, many answers are noise."
        ),
        {f"reinforcement.{key}": 1.0},
    )


@rule("ROLLOUT_NOT_WHOLE", "warning", "Rounds of PPO that do not fill their minibatches")
def rollout_not_whole(s: Situation) -> Hit | None:
    size, batch = s.config.reinforcement.rollout_size, s.config.training.effective_batch
    if s.config.training.objective != "ppo" or size % batch == 0:
        return None
    fix = max(batch, round(size / batch) * batch)
    what = (
        f"A round has {size} answers and a minibatch would have {batch}: every pass is one short update."
        if size < batch
        else f"{size} answers make {size // batch} minibatches of {batch} and one of {size % batch}, whose update is as large and noisier."
    )
    return Hit(
        "reinforcement.rollout_size",
        f"{size} with minibatches of {batch}",
        what,
        {"reinforcement.rollout_size": fix},
        safe=True,
    )


@rule("ANSWERS_CUT_SHORT", "warning", "Drawn answers that have no room to end")
def answers_cut_short(s: Situation, data: DataFacts) -> Hit | None:
    limit = s.config.reinforcement.max_new_tokens
    if not s.traits.draws or not data.answer_percentiles:
        return None
    usual = data.answer_percentiles[ANSWER_PERCENTILE]
    if usual <= limit:
        return None
    fix = {"reinforcement.max_new_tokens": min(-(-usual // 32) * 32, LONGEST_ANSWER)}
    return Hit(
        "reinforcement.max_new_tokens",
        f"{limit:,}, while a tenth of the expected answers have more than {usual:,} tokens",
        "An answer that is cut off is judged unfinished, so the model learns to be brief, or is never paid for what stands at the end.",
        fix,
        safe=s.memory_with(fix) is not None and s.still_fits(fix),
    )


@rule("EVAL_GROUP_OF_ONE", "advice", "Evaluation with one answer at a time")
def eval_group_of_one(s: Situation) -> Hit | None:
    training = s.config.training
    if s.traits.family != "group" or training.eval_batch_size >= 2:
        return None
    return Hit(
        "training.eval_batch_size",
        "1",
        "Answers to a prompt are compared with each other in evaluation too: at least 2 are drawn together, and the run uses 2.",
        {"training.eval_batch_size": 2},
        safe=True,
    )


@rule("DRAWN_BEYOND_CONTEXT", "warning", "Prompt and answer longer than the model's context")
def drawn_beyond_context(s: Situation) -> Hit | None:
    positions, limit = s.positions, s.config.data.max_length
    if not s.traits.draws or positions is None:
        return None
    longest = min(limit, s.data.length_percentiles[-1]) if s.data and s.data.length_percentiles else limit
    new = s.config.reinforcement.max_new_tokens
    if longest + new <= positions or new >= positions:
        return None
    return Hit(
        "data.max_length",
        f"prompts of up to {longest:,} tokens and {new:,} drawn ones",
        f"Together {longest + new:,}; the model was built for {positions:,}. Answers to long prompts break off, or the run stops.",
        {"data.max_length": max(positions - new, 8)},
        safe=True,
    )
