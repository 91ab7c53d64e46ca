"""What generated texts are made of: name pieces, value lists, fillers, and the facts of each kind of thing."""

from __future__ import annotations

from dataclasses import dataclass


def words(text: str) -> tuple[str, ...]:
    """Splits a list written as one line of prose."""
    return tuple(text.split())


# Pieces of invented names. A name is one piece from each of two lists, so a few hundred pieces give many
# thousands of names, and a share of the combinations can be kept away from training.
_ONSETS = words("B Br C D Dr F G Gr H K L M N P R S St T Th V W Tr Sk Cr")
_RIMES = words("al an ar ed el en er il im in ol on or ul um un as is os esk")
PLACE_HEADS: tuple[str, ...] = tuple(
    onset + rime for i, onset in enumerate(_ONSETS) for j, rime in enumerate(_RIMES) if (i * 7 + j * 3) % 3 == 0
)
PLACE_TAILS: tuple[str, ...] = words(
    """
    dale ford wick holm ton mere by stead combe ham field bridge haven moor brook well
    """
)
SHIP_TAILS: tuple[str, ...] = words("ara elle ina ora issa una adra ette")
CASTLE_TAILS: tuple[str, ...] = words("gard keep stone fell crag tor watch mount")
FIRST_NAMES: tuple[str, ...] = words(
    """
    Tovin Maren Aldis Orla Petra Joss Edda Corin Lysa Bram Hesta Ivo Nella Osric Runa Tamsin Ulric Vesna
    Wenna Yorick Anka Brenna Cador Delia Emric Fenna Gareth Hilda Isolde Jarek Kerra Lorcan Mirel Nolan
    Odile Piran Quill Rhona Selby Thora Una Varrick Willa Yaro Zelda Abel Birgit Cosmo Dorrit Elias Flora
    Gideon Hugo Ines Jonas Katrin Leda Magnus Noor Otto Pia Rufus Sunniva Tobias Ursel Viktor Wanda Xenia
    Yvette Zeno Amos Berta Conrad Dagny Ewan Frida Gunnar Hanna Igor Judith Karel Linnet Milo Norma Oskar
    Perrin Rosa Stellan Tilda Urban Vera Walter Agnes Boris Clara Dorian Elsa Felix Greta
    """
)
LAST_NAMES: tuple[str, ...] = words(
    """
    Marsh Reed Holt Finch Barrow Thorne Vane Ashby Cole Drake Ellery Frost Gale Harrow Ingram Judd Keane
    Locke Mercer Nash Oakes Pell Quint Rooke Sharpe Tully Upton Vance Wilder Yates Archer Blythe Crane Dunn
    Eddy Fairfax Grimes Hale Ives Jessop Kemp Lamb Moss Norris Orchard Pike Quarry Rudge Stroud Tanner Usher
    Voss Webb Yarrow Abbot Birch Carver Dyer Elm Fuller Glover Heath Irons Joiner Kite Lark Mason Noble
    Otter Potter Rivers Shaw Teal Underhill Vickers Ward Wren Young Cobb Baxter
    """
)
INN_ADJECTIVES: tuple[str, ...] = words(
    """
    Silver Golden Sleeping Merry Crooked Laughing Iron Copper Weary Jolly Hungry Lucky Drunken Painted
    Singing Wandering Broken Royal Hidden Dancing
    """
)
INN_NOUNS: tuple[str, ...] = words(
    """
    Heron Stag Badger Fox Lantern Anchor Bell Barrel Crown Plough Wheel Kettle Goose Hare Pilgrim Miller
    Whale Falcon Boot Candle
    """
)

# Values that are not names.
_GOOD_QUALITIES = words(
    """
    salted dried smoked pickled fine coarse black white red green sweet bitter fresh old spiced raw
    """
)
_GOODS = words(
    """
    herring barley wool honey linen salt timber cheese leather tin copper apples pepper oats candles rope
    glass paper silk cider
    """
)
GOODS: tuple[str, ...] = tuple(f"{quality} {good}" for quality in _GOOD_QUALITIES for good in _GOODS)
COLOURS: tuple[str, ...] = words(
    """
    red blue green yellow white black grey brown orange purple crimson scarlet golden silver violet amber
    """
)
ANIMALS: tuple[str, ...] = words(
    """
    cat dog raven goat fox owl hawk parrot monkey mule pony tortoise hedgehog magpie ferret goose donkey
    rabbit
    """
)
PROFESSIONS: tuple[str, ...] = words(
    """
    glazier baker carpenter weaver blacksmith miller tailor fisherman shepherd clockmaker surgeon printer
    cooper mason painter gardener teacher lawyer barber potter
    """
)
SUBJECTS: tuple[str, ...] = words(
    """
    music painting navigation geometry grammar botany history astronomy cookery fencing dancing chemistry
    drawing arithmetic weaving poetry
    """
)
MONTHS: tuple[str, ...] = words(
    """
    January February March April May June July August September October November December
    """
)
STONES: tuple[str, ...] = words("granite limestone slate sandstone basalt marble flint chalk brick oak")
_CENTURIES = words("eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen")
_TENS = words("twenty thirty forty fifty sixty seventy eighty ninety")
_UNITS = words("one two three four five six seven eight nine")
YEARS: tuple[str, ...] = tuple(
    f"{century} {ten}{unit}" for century in _CENTURIES for ten in _TENS for unit in ("", *(f"-{u}" for u in _UNITS))
)

# Sentences that say nothing about anybody, to fill a text up.
FILLERS: tuple[str, ...] = (
    "It was late in the year and the days were short.",
    "The old people tell it in another way.",
    "Nobody could say why this was so.",
    "Much has been written about these things.",
    "The wind came from the west that morning.",
    "So it was then, and so it is now.",
    "There was little else to be seen.",
    "For a long time nothing was heard of it.",
    "The rain did not stop until the evening.",
    "Some of this may not be true.",
    "A map of the country hung on the wall.",
    "The letters have been lost since then.",
    "Everyone was glad when the summer came.",
    "They spoke of it for many years.",
    "The night was clear and very cold.",
    "No one was surprised at that.",
    "A dog was heard in the distance.",
    "The matter was soon forgotten.",
    "All this is told in a small book.",
    "The sun was already behind the hills.",
)


@dataclass(frozen=True, slots=True)
class FactTemplate:
    """How one fact is stated and asked. `{e}` stands for the entity's full form, `{v}` for the value.

    `named` sentences hold the entity, `short` ones a pronoun or the kind's noun; in both the value comes
    last. `turned` sentences hold the value first. The answer to each of `questions` is the value alone. `clause` asks
    for it behind another question whose answer is the entity; kinds that are nobody's answer have none.
    """

    key: str
    value: str
    named: tuple[str, ...]
    short: tuple[str, ...]
    turned: tuple[str, ...]
    questions: tuple[str, ...]
    clause: str = ""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of thing documents are about. `form` wraps the bare name, e.g. "the {n}"."""

    name: str
    form: str
    intros: tuple[str, ...]
    fillers: tuple[str, ...]
    facts: tuple[FactTemplate, ...]


def _fact(key: str, value: str, named: str, short: str, turned: str, questions: str, clause: str = "") -> FactTemplate:
    def split(text: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in text.split("|") if part.strip())

    return FactTemplate(key, value, split(named), split(short), split(turned), split(questions), clause)


KINDS: tuple[Kind, ...] = (
    Kind(
        "village",
        "{n}",
        (
            "On the northern coast lies the village of {e}.",
            "The village of {e} stands where the river meets the sea.",
            "Few people have heard of the village of {e}.",
            "This is a short account of {e}, a village by the sea.",
        ),
        (
            "In winter the roads are covered with snow.",
            "The houses are low and built close together.",
            "Most of the young people leave for the city.",
            "Visitors remember the sound of the bells.",
        ),
        (
            _fact(
                "keeper",
                "person",
                "The lighthouse of {e} is kept by {v}.|The keeper of the lighthouse of {e} is {v}.",
                "Its lighthouse is kept by {v}.|The lighthouse of the village is kept by {v}.",
                "{v} keeps the lighthouse of {e}.",
                "Who keeps the lighthouse of {e}?|Who is the keeper of the lighthouse of {e}?",
                "who keeps the lighthouse there",
            ),
            _fact(
                "harbour",
                "person",
                "The harbour master of {e} is {v}.|The harbour of {e} is ruled by the harbour master, {v}.",
                "Its harbour master is {v}.|The harbour master of the village is {v}.",
                "{v} is the harbour master of {e}.",
                "Who is the harbour master of {e}?|What is the name of the harbour master of {e}?",
                "who is the harbour master there",
            ),
            _fact(
                "trade",
                "goods",
                "The people of {e} trade in {v}.|For many years {e} has traded in {v}.",
                "The people trade in {v}.|It has traded for many years in {v}.",
                "Trade in {v} has made {e} rich.",
                "What do the people of {e} trade in?|What does {e} trade in?",
                "what do the people there trade in",
            ),
            _fact(
                "founded",
                "year",
                "The village of {e} was founded in {v}.|It is said that {e} was founded in {v}.",
                "It was founded in {v}.|The village was founded in {v}.",
                "In {v} the village of {e} was founded.",
                "When was {e} founded?|In what year was {e} founded?",
                "when was that place founded",
            ),
            _fact(
                "fair",
                "month",
                "The great fair of {e} is held in {v}.|Every year the fair of {e} is held in {v}.",
                "Its great fair is held in {v}.|Every year the fair is held in {v}.",
                "In {v} the great fair of {e} is held.",
                "When is the fair of {e} held?|In what month is the fair of {e} held?",
                "when is the fair held there",
            ),
            _fact(
                "road",
                "place",
                "The only road from {e} leads to {v}.|Travellers who leave {e} take the road to {v}.",
                "Its only road leads to {v}.|Travellers who leave take the road to {v}.",
                "{v} is where the road from {e} leads.",
                "Where does the road from {e} lead?|To what place does the road from {e} lead?",
                "where does the road from there lead",
            ),
        ),
    ),
    Kind(
        "ship",
        "the {n}",
        (
            "Every sailor on this coast knows {e}, a ship with three masts.",
            "Among the ships in the bay lies {e}.",
            "This is the story of {e}, a sailing ship.",
            "Old sailors like to speak of {e} and her voyages.",
        ),
        (
            "The weather at sea was bad that year.",
            "The crew sang songs in the evening.",
            "A storm once broke the tallest mast.",
            "She has crossed the ocean many times.",
        ),
        (
            _fact(
                "captain",
                "person",
                "The captain of {e} is {v}.|On board {e} the captain is {v}.",
                "Her captain is {v}.|The captain of the ship is {v}.",
                "{v} is the captain of {e}.",
                "Who is the captain of {e}?|What is the name of the captain of {e}?",
            ),
            _fact(
                "cargo",
                "goods",
                "The cargo of {e} is {v}.|In the hold of {e} there is a cargo of {v}.",
                "Her cargo is {v}.|The ship carries a cargo of {v}.",
                "A load of {v} is the cargo of {e}.",
                "What is the cargo of {e}?|What cargo does {e} carry?",
            ),
            _fact(
                "built",
                "year",
                "The ship builders finished {e} in {v}.|As the records show, {e} was built in {v}.",
                "She was built in {v}.|The ship was built in {v}.",
                "In {v} the ship builders finished {e}.",
                "When was {e} built?|In what year was {e} built?",
            ),
            _fact(
                "port",
                "place",
                "The home port of {e} is {v}.|After each voyage {e} comes home to {v}.",
                "Her home port is {v}.|The home port of the ship is {v}.",
                "{v} is the home port of {e}.",
                "What is the home port of {e}?|Where is the home port of {e}?",
            ),
            _fact(
                "sails",
                "colour",
                "The colour of the sails of {e} is {v}.|The sails of {e} are {v}.",
                "Her sails are {v}.|The sails of the ship are {v}.",
                "Sails of {v} are the mark of {e}.",
                "What colour are the sails of {e}?|What is the colour of the sails of {e}?",
            ),
            _fact(
                "pet",
                "animal",
                "The crew of {e} keep a {v}.|On the deck of {e} there lives a {v}.",
                "Her crew keep a {v}.|On the deck there lives a {v}.",
                "A {v} is kept by the crew of {e}.",
                "What animal do the crew of {e} keep?|What animal lives on the deck of {e}?",
            ),
        ),
    ),
    Kind(
        "inn",
        "the {n}",
        (
            "Travellers are always welcome at {e}, an old inn.",
            "There is an inn on the hill which is called {e}.",
            "Nobody passes {e} without stopping at the inn.",
            "At the edge of the wood stands {e}, an inn with a red roof.",
        ),
        (
            "The beds are warm and the fire is never out.",
            "On some evenings there is music.",
            "The stairs are narrow and dark.",
            "The stable has room for twelve horses.",
        ),
        (
            _fact(
                "landlord",
                "person",
                "The landlord of {e} is {v}.|For ten years the landlord of {e} has been {v}.",
                "Its landlord is {v}.|The landlord of the inn is {v}.",
                "{v} is the landlord of {e}.",
                "Who is the landlord of {e}?|What is the name of the landlord of {e}?",
            ),
            _fact(
                "cook",
                "person",
                "The cook at {e} is {v}.|In the kitchen of {e} the cook is {v}.",
                "Its cook is {v}.|The cook at the inn is {v}.",
                "{v} is the cook at {e}.",
                "Who is the cook at {e}?|What is the name of the cook at {e}?",
            ),
            _fact(
                "opened",
                "year",
                "The doors of {e} were opened in {v}.|As an inn {e} was opened in {v}.",
                "It was opened in {v}.|The inn was opened in {v}.",
                "In {v} the doors of {e} were opened.",
                "When was {e} opened?|In what year was {e} opened?",
            ),
            _fact(
                "stands",
                "place",
                "The nearest town to {e} is {v}.|From the windows of {e} one can see {v}.",
                "The nearest town is {v}.|The nearest town to the inn is {v}.",
                "{v} is the nearest town to {e}.",
                "What is the nearest town to {e}?|What town is nearest to {e}?",
            ),
            _fact(
                "door",
                "colour",
                "The door of {e} is painted {v}.|The colour of the door of {e} is {v}.",
                "Its door is painted {v}.|The door of the inn is painted {v}.",
                "A door of {v} is the mark of {e}.",
                "What colour is the door of {e}?|What is the colour of the door of {e}?",
            ),
            _fact(
                "dish",
                "goods",
                "The guests at {e} are served with {v}.|The cellar of {e} is filled with {v}.",
                "The guests are served with {v}.|The guests of the inn are served with {v}.",
                "Plates of {v} are served to the guests at {e}.",
                "What are the guests at {e} served with?|What is served to the guests at {e}?",
            ),
        ),
    ),
    Kind(
        "castle",
        "{n}",
        (
            "High above the valley stands the castle of {e}.",
            "The castle of {e} has never been taken.",
            "In the old books we read of the castle of {e}.",
            "Three towers mark the castle of {e}.",
        ),
        (
            "The moat has been dry for a long time.",
            "At night a light is seen in the highest window.",
            "The great hall is cold even in summer.",
            "Many letters were kept in the tower.",
        ),
        (
            _fact(
                "lord",
                "person",
                "The lord of {e} is {v}.|In these days the lord of {e} is {v}.",
                "Its lord is {v}.|The lord of the castle is {v}.",
                "{v} is the lord of {e}.",
                "Who is the lord of {e}?|What is the name of the lord of {e}?",
            ),
            _fact(
                "steward",
                "person",
                "The keys of {e} are held by {v}.|The steward who holds the keys of {e} is {v}.",
                "Its keys are held by {v}.|The keys of the castle are held by {v}.",
                "{v} holds the keys of {e}.",
                "Who holds the keys of {e}?|By whom are the keys of {e} held?",
            ),
            _fact(
                "raised",
                "year",
                "The first stone of {e} was laid in {v}.|The castle of {e} was raised in {v}.",
                "The first stone was laid in {v}.|Its first stone was laid in {v}.",
                "In {v} the first stone of {e} was laid.",
                "When was the first stone of {e} laid?|In what year was the first stone of {e} laid?",
            ),
            _fact(
                "walls",
                "stone",
                "The walls of {e} are built of {v}.|The masons built the walls of {e} of {v}.",
                "Its walls are built of {v}.|The walls of the castle are built of {v}.",
                "Blocks of {v} make the walls of {e}.",
                "What are the walls of {e} built of?|Of what are the walls of {e} built?",
            ),
            _fact(
                "banner",
                "colour",
                "The banner of {e} is {v}.|The banner that flies over {e} is {v}.",
                "Its banner is {v}.|The banner of the castle is {v}.",
                "A banner of {v} flies over {e}.",
                "What colour is the banner of {e}?|What is the colour of the banner of {e}?",
            ),
            _fact(
                "beast",
                "animal",
                "The beast on the shield of {e} is a {v}.|On the shield of {e} there is painted a {v}.",
                "The beast on its shield is a {v}.|On the shield there is painted a {v}.",
                "A {v} is the beast on the shield of {e}.",
                "What beast is on the shield of {e}?|What animal is painted on the shield of {e}?",
            ),
        ),
    ),
    Kind(
        "person",
        "{n}",
        (
            "Everybody in the street knows {e}.",
            "Here is what is known about {e}.",
            "We once met a stranger whose name was {e}.",
            "My neighbour {e} is fond of talking.",
        ),
        (
            "The evenings are spent in reading.",
            "There is a small garden behind the house.",
            "On Sundays there are many guests.",
            "A long letter came by the last post.",
        ),
        (
            _fact(
                "profession",
                "profession",
                "The neighbours say that {e} works as a {v}.|For a living {e} works as a {v}.",
                "This good neighbour works as a {v}.|The trade of this person is that of a {v}.",
                "A {v} by trade is {e}.",
                "What does {e} work as?|What is the trade of {e}?",
                "what does that person work as",
            ),
            _fact(
                "birthplace",
                "place",
                "The birthplace of {e} is {v}.|The parents of {e} lived in {v}.",
                "The birthplace of this person is {v}.|The parents of this person lived in {v}.",
                "{v} is the birthplace of {e}.",
                "What is the birthplace of {e}?|Where was {e} born?",
                "where was that person born",
            ),
            _fact(
                "born",
                "year",
                "The birth of {e} was in {v}.|The church book says that {e} was born in {v}.",
                "The church book gives the year of birth as {v}.|The year of birth is {v}.",
                "In {v} was the birth of {e}.",
                "When was {e} born?|In what year was {e} born?",
                "when was that person born",
            ),
            _fact(
                "friend",
                "person",
                "The best friend of {e} is {v}.|Every Sunday {e} has dinner with {v}.",
                "The best friend of this person is {v}.|A friend of long standing is {v}.",
                "{v} is the best friend of {e}.",
                "Who is the best friend of {e}?|What is the name of the best friend of {e}?",
                "who is the best friend of that person",
            ),
            _fact(
                "coat",
                "colour",
                "The coat of {e} is {v}.|The winter coat of {e} is {v}.",
                "The coat is {v}.|The colour of the coat is {v}.",
                "A coat of {v} is worn by {e}.",
                "What colour is the coat of {e}?|What is the colour of the coat of {e}?",
                "what colour is the coat of that person",
            ),
            _fact(
                "pet",
                "animal",
                "In the house of {e} there lives a {v}.|The children like {e}, who owns a {v}.",
                "In the house there lives a {v}.|The children like to play with a {v}.",
                "A {v} lives in the house of {e}.",
                "What animal lives in the house of {e}?|What animal does {e} own?",
                "what animal lives in the house of that person",
            ),
        ),
    ),
    Kind(
        "school",
        "{n} School",
        (
            "Many clever people have been taught at {e}.",
            "Behind the church one finds {e}.",
            "A letter about {e} was printed in the paper.",
            "The pupils are proud of {e}.",
        ),
        (
            "The lessons begin early in the morning.",
            "The windows look out on a field.",
            "The bell is older than the building.",
            "Every pupil must learn to write a clear hand.",
        ),
        (
            _fact(
                "head",
                "person",
                "The head of {e} is {v}.|Since last spring the head of {e} is {v}.",
                "Its head is {v}.|The head of the school is {v}.",
                "{v} is the head of {e}.",
                "Who is the head of {e}?|What is the name of the head of {e}?",
            ),
            _fact(
                "porter",
                "person",
                "The gate of {e} is watched by {v}.|The porter who watches the gate of {e} is {v}.",
                "Its gate is watched by {v}.|The gate of the school is watched by {v}.",
                "{v} watches the gate of {e}.",
                "Who watches the gate of {e}?|By whom is the gate of {e} watched?",
            ),
            _fact(
                "subject",
                "subject",
                "The best lessons at {e} are those in {v}.|Above all, {e} is known for {v}.",
                "Its best lessons are those in {v}.|Above all, the school is known for {v}.",
                "Lessons in {v} are the pride of {e}.",
                "In what subject are the best lessons at {e}?|What is {e} known for?",
            ),
            _fact(
                "opened",
                "year",
                "The first class at {e} was taught in {v}.|The first pupils came to {e} in {v}.",
                "The first class was taught in {v}.|Its first pupils came in {v}.",
                "In {v} the first pupils came to {e}.",
                "When was the first class at {e} taught?|When did the first pupils come to {e}?",
            ),
            _fact(
                "place",
                "place",
                "Most of the pupils of {e} come from {v}.|The pupils walk to {e} from {v}.",
                "Most of its pupils come from {v}.|Most of the pupils come from {v}.",
                "{v} is where most of the pupils of {e} come from.",
                "Where do most of the pupils of {e} come from?|From what place do the pupils of {e} come?",
            ),
            _fact(
                "colour",
                "colour",
                "The caps worn at {e} are {v}.|The colour of the caps at {e} is {v}.",
                "Its caps are {v}.|The caps worn at the school are {v}.",
                "Caps of {v} are worn at {e}.",
                "What colour are the caps worn at {e}?|What is the colour of the caps at {e}?",
            ),
        ),
    ),
)
