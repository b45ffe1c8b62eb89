"""The method. Read the starred files first, the others when you need them. A file imports only files above it, except
that `molmo2.py` names two types of `generate.py`. From outside the folder they use `files.py`, `media.py`, `video.py`,
`unread.py` and, to load and save, `store.py` and `settings.py`.

      config.py     the numbers of a checkpoint
    * image.py      a picture becomes patches
    * mask.py       which token attends to which
    * prompt.py     text, pictures and responses become one row of token ids
      ops.py        how the arithmetic is made fast; skip it at a first reading
    * lora.py       the matrices that are trained
    * molmo2.py     the network
      generate.py   cache and sampling, for a policy only
      data.py       records, and rows collated into a batch
      ahead.py      work for threads while the network computes
      order.py      which records a step learns from, in which order
    * reward.py     the hidden state at each response's last token becomes a score
    * loss.py       scores and a known ranking become a loss
      parallel.py   a step shared by several devices
      state.py      what is kept of an unfinished run
    * training.py   records, scores, loss, gradient, step
      held_out.py   scores of records that were not trained on, and of controls
      grpo.py       a policy learns from such scores
      flops.py      what a pass costs, counted
"""
