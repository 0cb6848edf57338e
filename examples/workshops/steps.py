"""The content of a workshop: ten steps, the same for each."""

FREE = 6

STEPS = (
    ("The one sentence", "Write what the product is, for whom, and what it replaces. One sentence, no commas."),
    ("Who is waiting for it", "Name three people who would use it this week. Not segments: people, with names."),
    ("What they do today", "Describe the last time one of them had the problem, hour by hour."),
    ("What it costs them", "Put a number on it: minutes, money, or the meeting nobody wanted."),
    (
        "What must be true",
        "List the assumptions that would sink the idea if they were wrong. Sort by how little you know.",
    ),
    ("The smallest proof", "Choose the riskiest assumption and the cheapest way to test it before Friday."),
    ("The first screen", "Draw only what the first person needs on the first day. Cross out half of it."),
    ("Five conversations", "Show the drawing to five people. Write down what they did, not what they said."),
    ("Keep, change, stop", "Decide on each assumption with what you saw. Stopping is a result."),
    ("The first release", "Cut until it fits into two weeks. Write the sentence of step one again and compare."),
)
