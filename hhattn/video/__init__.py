"""The bundled video model: a small diffusion transformer that generates minutes of 720x1280 at constant memory.

Read in this order: :mod:`.world` (what it is trained on), :mod:`.text`, :mod:`.codec`, :mod:`.field` and :mod:`.model`
(the transformer), :mod:`.prior` (where things move), :mod:`.sampler`, :mod:`.generate`.
"""
