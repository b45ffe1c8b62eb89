"""The method: read what has a star, the rest when you need it. A file imports only those above it, but for two types of
`generate.py` that `molmo2.py` names. From outside they use `files.py`, `media.py`, `video.py`, `unread.py` and, to load
and save, `store.py` and `settings.py`.

      config.py     the numbers of a checkpoint
    * image.py      a picture becomes patches
    * mask.py       which token attends to which
    * prompt.py     text, pictures and responses become one row of token ids
      ops.py        how the arithmetic is made fast; leave it closed at a first reading
    * lora.py       the matrices that are trained
    * molmo2.py     the network
      generate.py   cache and sampling, for a policy only
      data.py       records, and rows collated into a batch
      ahead.py      what threads do while the network computes
      order.py      which records a step learns from, in which order
    * reward.py     the hidden state at each response's last token becomes a score
    * loss.py       scores and a known ranking become a loss
      parallel.py   a step shared by several devices
      state.py      what is kept of an unfinished run
    * training.py   records, scores, loss, gradient, step
      held_out.py   records that were not trained on, and controls, scored
      grpo.py       a policy learns from such scores
      flops.py      what a pass costs, counted
"""
