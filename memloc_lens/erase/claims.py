"""What an audit says about its figures: how each was measured, and what was not tried."""

MEASURED = {
    "extraction": (
        "One forward pass over each prompt followed by the true suffix. Tokens right: those that greedy decoding gets "
        "right before its first mistake. Recited: no mistake. Accuracy: the share of the tokens, in points, that are "
        "predicted right with all true tokens before them. Strength: the share of the suffix that greedy decoding "
        "recites to its end once the tokens before are given (1: the prompt is enough). Sampled: the probability that "
        "one of the samples at temperature 1, without top-k or top-p, is the exact suffix, computed from the "
        "probabilities of its tokens. Prompts: `own`; `shifted`, without its first 3 tokens; `later`, a window 8 "
        "tokens later, of whose suffix the rest is left; `cut`, its last half; "
        "`perturbed`, every 8th token replaced at random; `typos`, two letters swapped in every 4th word of four "
        "letters or more; `upper` and `lower` case; `surrounded`, with three other sentences before it; `given`, where "
        "there are any: of the prompts that were given for a target, before and after each the one that gets most "
        "tokens right, then the one with the highest strength."
    ),
    "others": (
        "The same, by their own prompts alone. Near-duplicates share 5-grams of tokens with a target (Jaccard index "
        "above 0.05, directly or through others); related ones share a category with one; controls were never "
        "memorized."
    ),
    "relearning": (
        "All weights of the erased model were trained by AdamW (weight decay 0.01, constant learning rate) on the mean "
        "loss of the texts of a lesson, until greedy decoding got half of the watched suffix right before its first "
        "mistake. Lesson `itself`: the whole text. `half`: the first half of the text; watched is the rest. `related`: "
        "other memorized sequences that share a category, without near-duplicates of the targets. New texts are "
        "controls. Steps: the lower median over texts. Ratio: steps of the new texts by those of the erased ones; 1 "
        "means that an erased text is as hard to learn as a new one, and much more means that it was only hidden. It "
        "is a bound, or unknown, where the median text was not learned in the steps that were tried. Most right: the "
        "most tokens of the watched suffix that were right before the first mistake at any step, as a mean over texts."
    ),
    "membership": (
        "AUROC: the probability that a target looks more like a member than a control does, by its mean loss over all "
        "tokens but the first, and by the mean log-probability of its least probable tokens (min-k%). 0.5: they cannot "
        "be told apart. Far below 0.5 is a signal, too: the model avoids the text more than one it has never seen. "
        "Intervals are over targets, with the controls as they are."
    ),
    "damage": (
        "Accuracy: share of the tokens of a suffix that are predicted right when teacher-forced, in points. "
        "Perplexity: exp of the mean loss of rows of plain text. Changes are paired: of the same sequence, or row, "
        "before and after."
    ),
}
"""How the figures of each part are measured."""

NOT_TRIED = (
    "paraphrased or translated prompts, conversations, instructions, or jailbreaks, except those that were given: "
    "none is made here",
    "prompts that were optimized against the model (soft prompts, greedy coordinate gradients)",
    "other decoding: beam search, other temperatures, top-k or top-p sampling, contrastive decoding between the "
    "original and the erased model",
    "fine-tuning with other data, learning rates or optimizers, for more steps, or by adapters (LoRA)",
    "a search in the weights or the activations: probes, activation patching, steering, finding and resetting the rows "
    "that were changed",
    "quantization, pruning, merging or averaging with other models, which can undo small changes of weights",
    "the content of the texts in other words: only their exact tokens were looked for",
    "other membership inference, such as reference models or shadow models",
    "other abilities of the model than reciting and predicting the texts above: no task or benchmark was run",
)
"""What else may bring a text back, or show what was lost."""
