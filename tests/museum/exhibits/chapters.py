"""The chapters of the page: one for each kind of mistake, with what is to be said about all of it."""

# by kind, in the order of the page: the heading and the text
CHAPTERS = {
    "factor": (
        "A factor too many, or too few",
        "The gradient has the right direction and the wrong length: by the number of ranks, of microbatches, or of "
        "tokens. It is the most frequent mistake, because a mean may be taken in four places (over tokens, "
        "microbatches, ranks, and by the library itself), and each is right if nobody else does it. Adam divides the "
        "factor out again, so loss curves do not show it; the norm and an SGD step do.",
    ),
    "own part only": (
        "A sum that is not taken",
        "A rank has one term of a sum and uses it as if it were the sum. Usually somebody has forgotten one weight, "
        "one layout, or one order of two calls. The sum over all ranks is often nearly a multiple of one term, which "
        "is why such runs train.",
    ),
    "one part missing": (
        "One part left out",
        "Most of the sum is there. What is missing is one rank's part, the last microbatch, or the gradient that "
        "should have come through a call that autograd does not follow.",
    ),
    "counted more than once": (
        "Counted more than once",
        "The opposite: what all ranks have in common is added as if each had another. In a norm this makes every step "
        "too short, by a factor that grows with the machine.",
    ),
    "positions": (
        "Right values in wrong places",
        "All numbers exist, and some of them are where others belong. Sequences that are cut and put together again "
        "are where this happens: tokens, their positions, and their labels must all be cut in the same way.",
    ),
    "mask": (
        "Another mask",
        "A mask decides what counts. It is computed twice, or from what has been changed since.",
    ),
    "stale": (
        "Values of another moment",
        "A buffer holds what it held a microbatch, a step of the ring, or an optimiser step ago. Shapes are right, "
        "sizes are right, and the values are even nearly right. The first step often has no error at all.",
    ),
    "weight decay": (
        "Weight decay on the wrong weights",
        "Gradients, norm and moments are right. Whether a weight decays is decided by its shape, and sharding changes "
        "shapes.",
    ),
    "rounding": (
        "Rounding where it adds up",
        "Nothing is wrong but the precision, in a place that is visited again and again.",
    ),
    "unknown": (
        "Others",
        "Values of other sentences, or other ranks, mixed into a sum.",
    ),
}

# what the bugs of a kind do, as the end of a sentence
SHORT = {
    "factor": "multiply or divide by something once too often",
    "own part only": "take a rank's own part for the sum",
    "one part missing": "leave a part of a sum out",
    "counted more than once": "count something twice",
    "positions": "put right values in wrong places",
    "mask": "use another mask",
    "stale": "use values of another moment",
    "weight decay": "let the wrong weights decay",
    "rounding": "round where it adds up",
    "unknown": "mix what does not belong together",
}
