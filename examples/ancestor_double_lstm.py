"""The second example of ntm_keras: a controller of two stateful LSTM layers.

There, the recurrent state of the controller was lost from step to step; here it is carried as part of the NTM's own
state, and `ntm.cell.state_layout` names it. Changed only where Keras 3 changed: the batch's shape is an `Input`, the
LSTM that feeds another returns its sequences, and ``implementation`` is gone.
"""

from keras import Input
from keras.layers import LSTM
from keras.models import Sequential
from keras.optimizers import Adam

import ntm
from ntm import NeuralTuringMachine as NTM  # noqa: N817 - as the README had it

input_dim, output_dim, n_slots, m_depth, shift_range, batch_size = 10, 8, 50, 20, 3, 100


def build():
    """The copy model with a double LSTM as controller."""
    controller_input_dim, controller_output_dim = ntm.controller_input_output_shape(
        input_dim, output_dim, m_depth, n_slots, shift_range, 1, 1
    )
    controller = Sequential(name="double_lstm")
    controller.add(Input(batch_shape=(batch_size, None, controller_input_dim)))
    controller.add(LSTM(units=150, stateful=True, return_sequences=True))
    controller.add(LSTM(units=controller_output_dim, activation="sigmoid", stateful=True))
    sgd = Adam(learning_rate=5e-4, clipnorm=10)
    controller.compile(loss="binary_crossentropy", optimizer=sgd, metrics=["binary_accuracy"])

    model = Sequential(name="NTM_-_" + controller.name)
    model.add(
        NTM(
            output_dim,
            n_slots=n_slots,
            m_depth=m_depth,
            shift_range=shift_range,
            controller_model=controller,
            return_sequences=True,
            input_shape=(None, input_dim),
            batch_size=batch_size,
        )
    )
    model.compile(loss="binary_crossentropy", optimizer=sgd, metrics=["binary_accuracy"])
    return model


if __name__ == "__main__":
    from ancestor_dense import copy_sequences

    model = build()
    for component in model.layers[0].cell.state_layout:
        print(component)
    model.fit(*copy_sequences(batch_size), batch_size=batch_size, epochs=5)
