"""Sentences for the demonstration, written for it: 40 pairs with a similarity of 0 to 5 by one person's judgement.

They are enough to see whether a quantized encoder still ranks as its float32 original does, and far too few to say how
good either is; the STS-B benchmark in `benchmarks/` is the measurement.
"""

from __future__ import annotations

PAIRS: tuple[tuple[str, str, float], ...] = (
    ("A man is eating a bowl of soup.", "A man eats soup from a bowl.", 4.9),
    ("The cat sleeps on the warm window sill.", "A cat is napping by the window.", 4.3),
    ("Children are playing football in the park.", "Some kids play soccer outdoors.", 4.5),
    ("She bought a new bicycle yesterday.", "Yesterday she purchased a new bike.", 5.0),
    ("The train to the coast leaves at noon.", "The coastal train departs at twelve o'clock.", 4.7),
    ("He repaired the kitchen sink himself.", "He fixed the sink without a plumber.", 4.2),
    ("The company reported higher profits this quarter.", "Quarterly earnings of the firm went up.", 4.6),
    ("Heavy rain flooded several streets in the city.", "City roads were under water after a downpour.", 4.4),
    ("The museum opens at ten on Sundays.", "On Sundays the museum is open from ten o'clock.", 4.9),
    ("Scientists discovered a new species of frog.", "A previously unknown frog was found by researchers.", 4.8),
    ("The teacher explained the theorem on the board.", "A teacher writes on a blackboard.", 3.0),
    ("A woman is slicing onions for dinner.", "A woman is cutting vegetables.", 3.8),
    ("Two dogs run along the beach.", "A dog is swimming in the sea.", 2.4),
    ("The flight was delayed because of fog.", "Bad weather grounded the aeroplane for hours.", 3.7),
    ("He plays the violin in an orchestra.", "She plays the cello in a quartet.", 2.3),
    ("The recipe needs two cups of flour.", "Add sugar and butter to the dough.", 2.1),
    ("The court rejected the appeal.", "Judges heard the case on Monday.", 2.2),
    ("A storm is moving towards the islands.", "The islanders prepare for a hurricane.", 3.5),
    ("The phone's battery lasts two days.", "This phone has an excellent camera.", 1.8),
    ("They painted the old fence green.", "The garden fence was replaced last year.", 1.9),
    ("The library lends books for three weeks.", "You may keep a borrowed book for twenty-one days.", 4.3),
    ("The price of coffee rose sharply.", "Coffee has become much more expensive.", 4.7),
    ("A boy is riding a horse through a field.", "A girl is feeding a horse in a stable.", 2.0),
    ("The bridge was closed for repairs.", "Workers are building a new tunnel.", 1.5),
    ("Our team won the match in extra time.", "Our team lost the match in extra time.", 2.8),
    ("The patient recovered quickly after surgery.", "After the operation the patient got well soon.", 4.7),
    ("Volcanoes can change the climate for years.", "The mountain is popular with hikers.", 0.8),
    ("The mayor promised to plant a thousand trees.", "A thousand trees will be planted, says the mayor.", 4.6),
    ("Fresh snow covered the ski slopes.", "The stock market closed lower today.", 0.0),
    ("He forgot his umbrella on the bus.", "Photosynthesis turns light into sugar.", 0.0),
    ("The orchestra tuned their instruments.", "The engine needs a new spark plug.", 0.1),
    ("A spider spins its web between the branches.", "The parliament passed the budget.", 0.0),
    ("She teaches mathematics at a university.", "The soup needs a little more salt.", 0.0),
    ("The ship sailed before sunrise.", "The vessel left port early in the morning.", 4.3),
    ("Bees are vital for pollinating crops.", "Farmers depend on insects that pollinate plants.", 3.9),
    ("The laptop comes with a two-year warranty.", "The guarantee of the computer lasts two years.", 4.6),
    ("A new bakery opened on the corner.", "The corner shop sells newspapers.", 1.6),
    ("He learns Spanish with a podcast.", "She speaks Spanish and French fluently.", 1.9),
    ("The glacier has lost a third of its ice.", "A third of the glacier has melted.", 4.8),
    ("The tickets were sold out within an hour.", "Nobody wanted to see the concert.", 1.2),
)  # fmt: skip
