"""Room: loss laws, what they make of a budget, and how they are fitted. Knows no chip and no price."""
