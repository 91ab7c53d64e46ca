// What the playground begins with: texts of the kind that the demo model was trained on.

export const DOCUMENTS = [
  "Old sailors like to speak of the Nonelle and her voyages. The captain of the ship is Ulric Ward. No one was surprised at that. As the records show, the Nonelle was built in sixteen sixty-five. Everyone was glad when the summer came. For a long time nothing was heard of it. The crew sang songs in the evening. The letters have been lost since then. On the deck of the Nonelle there lives a goose. They spoke of it for many years. Her cargo is sweet herring. A map of the country hung on the wall. A storm once broke the tallest mast.",
  "Everybody in the street knows Yvette Pike. For a living Yvette Pike works as a shepherd. The birthplace of this person is Treskbrook. All this is told in a small book. The birth of Yvette Pike was in seventeen thirty-three. A long letter came by the last post. The evenings are spent in reading. The letters have been lost since then. The coat of Yvette Pike is brown. On Sundays there are many guests. A map of the country hung on the wall. The wind came from the west that morning. In the house of Yvette Pike there lives a ferret.",
  "On the northern coast lies the village of Ninton. The people trade in salted tin. Every year the fair of Ninton is held in December. Nobody could say why this was so. In winter the roads are covered with snow. A map of the country hung on the wall. The village of Ninton was founded in thirteen twenty-three. Some of this may not be true. The matter was soon forgotten. The lighthouse of Ninton is kept by Yvette Pike. The night was clear and very cold. Its only road leads to Kanwick. Most of the young people leave for the city.",
  "Many clever people have been taught at Gimholm School. Most of the pupils of Gimholm School come from Ninton. The colour of the caps at Gimholm School is crimson. Since last spring the head of Gimholm School is Runa Harrow. The porter who watches the gate of Gimholm School is Nolan Orchard. No one was surprised at that. The first class at Gimholm School was taught in seventeen thirty-two. The night was clear and very cold. The old people tell it in another way. Above all, Gimholm School is known for grammar. Much has been written about these things. They spoke of it for many years.",
];

export const QUESTIONS = [
  "What cargo does the Nonelle carry?",
  "What is the colour of the coat of Yvette Pike?",
  "What colour are the caps worn at Gimholm School?",
];
